"""Model, rows and configuration of a command that trains nothing: those of its options, or the demo's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd_train.backbone import embeddings_of
from opsd_train.commands.options import parse
from opsd_train.config import OPSDConfig
from opsd_train.data.rows import Reading, load_rows
from opsd_train.demo.run import MODEL, presets
from opsd_train.loading import load, load_source
from opsd_train.reading.prompts import Encoder, Prompt
from opsd_train.run_options import RunOptions

DEFAULTS = ("--output_dir=opsd-unused",)


@dataclass(frozen=True)
class Given:
    """What was loaded: the model on its device with its name, and the rows as `load_rows` takes them."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str | Sequence[Mapping[str, Any]]
    reading: Reading = field(default_factory=Reading)

    def prompts(self, config: OPSDConfig) -> list[Prompt]:
        """All rows, encoded with the templates and budgets of `config`."""
        encoder = Encoder.of(self.tokenizer, config, embeddings=embeddings_of(self.model))
        return encoder.encode(load_rows(self.source, config.to_templates(), reading=self.reading))


def config_of(demo: bool, arguments: Sequence[str]) -> OPSDConfig:
    """The configuration of `--name value` arguments, which beat the demo's preset."""
    if demo:
        (config,) = parse([OPSDConfig], presets(arguments), arguments, DEFAULTS)
    else:
        _, config = parse([RunOptions, OPSDConfig], [], arguments, DEFAULTS)
    return config


def load_given(arguments: Sequence[str], demo_rows: Sequence[Mapping[str, Any]] | None) -> Given:
    """Load the `--model` and `--data` of the arguments, or the demo's model for rows of the demo.

    Raises ValueError for anything that is wrong with them.
    """
    if demo_rows is not None:
        name = "opsd demo"
        model, tokenizer = load(str(MODEL))
        source: str | Sequence[Mapping[str, Any]] = demo_rows
        reading = Reading()
    else:
        options, _ = parse([RunOptions, OPSDConfig], [], arguments, DEFAULTS)
        name = options.model
        model, tokenizer = load_source(options.source())
        source, reading = options.data, options.reading()
    device = config_of(demo_rows is not None, arguments).device
    return Given(name, model.to(device), tokenizer, source, reading)  # type: ignore[arg-type]

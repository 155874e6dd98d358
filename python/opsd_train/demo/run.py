"""The demo: a model that half knows addition teaches itself from what it can read off the answer."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from opsd_train.commands.options import parse
from opsd_train.config import OPSDConfig
from opsd_train.data.rows import load_rows
from opsd_train.demo import task
from opsd_train.loading import load
from opsd_train.run_folder import check_output
from opsd_train.train import make_trainer
from opsd_train.trainer import OPSDTrainer

HERE = Path(__file__).parent
PRESET, OF_METHODS, MODEL = HERE / "preset.yaml", HERE / "preset_of_methods.yaml", HERE / "model"
THREADS = 1  # at this size more gain little, wait for each other on a busy machine, and sum in another order


def presets(arguments: Sequence[str]) -> list[Path]:
    """The files with the demo's options, by whether the arguments (`--name value`) name a method."""
    names = {word[2:].partition("=")[0] for word in arguments if word.startswith("--")}
    return [PRESET, OF_METHODS] if "method" in names else [PRESET]


def demo(arguments: Sequence[str], console: Console, command: str = "opsd demo") -> OPSDTrainer:
    """The demo's trainer, with `arguments` (`--name value`) in place of what the preset says.

    An earlier run of the same command may be in its folder. ValueError for anything else there.
    """
    (config,) = parse([OPSDConfig], presets(arguments), arguments)
    check_output(config.output_dir, "replace", command)
    torch.set_num_threads(THREADS)
    with console.status("preparing"):
        model, tokenizer = load(str(MODEL))
        count = config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
        drawn = task.train_problems(count, torch.Generator().manual_seed(config.seed))
        rows, held_out = (
            load_rows(problems, config.to_templates()) for problems in (drawn, task.report_problems())
        )
        return make_trainer(model, tokenizer, rows, held_out, config)

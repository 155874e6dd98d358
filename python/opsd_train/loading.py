"""Model and tokenizer from a folder, a hub id or a GGUF file, and LoRA adapters on top."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from opsd_train.adapters import Adapter, Wanted, adapter_at, merged, with_adapter, with_adapter_on, with_lora
from opsd_train.hub import HUB_ID
from opsd_train.model_files import check_files, configuration, expected, from_files
from opsd_train.quantized import option_of, prepared, quantization
from opsd_train.safety.folders import whole_folder
from opsd_train.safety.student_files import write_student

# Of a folder's configuration and of its tokenizer, in any form, a file that there must be.
PARTS = (
    ("config.json", "adapter_config.json"),
    ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Reader:
    """Who reads: a tokenizer, and the model's positions and embeddings, if its configuration says."""

    tokenizer: PreTrainedTokenizerBase
    positions: int | None
    embeddings: int | None = None


@dataclass(frozen=True)
class Source:
    """A model, and how its weights are loaded.

    Args:
        model: a local folder or a hub id.
        dtype: `float32`, `bfloat16` or `float16`. Weights that are trained lose small updates in the others.
        gguf_file: name of a GGUF file in that folder; the weights are dequantised.
        revision: of a hub id, the commit, tag or branch to load.
        attention: a name of transformers for how attention is computed; None leaves it to the model.
        bits: 4 or 8 for weights that bitsandbytes quantises, 0 for weights as they are.
    """

    model: str
    dtype: str = "float32"
    gguf_file: str | None = None
    revision: str | None = None
    attention: str | None = None
    bits: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}; got {self.dtype!r}")
        names = ["eager", *sorted(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]
        if self.attention is not None and self.attention not in names:
            raise ValueError(
                f"attn_implementation: expected one of {', '.join(names)}; got {self.attention!r}"
            )


def load(
    model: str, dtype: str = "float32", gguf_file: str | None = None, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_source` of these."""
    return load_source(Source(model, dtype, gguf_file, revision))


def load_source(source: Source) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer; code that comes with a model is never run.

    Adapters are merged into the model they were trained on. Raises ValueError for what was expected and was
    not there, and for quantised weights, which are for adapters in training.
    """
    if source.bits:
        raise ValueError(f"{option_of(source.bits)}: expected for training alone; got it elsewhere")
    found, tokenizer, adapter = _below(source)
    return (found if adapter is None else merged(with_adapter(found, adapter))), tokenizer


def load_student(
    source: Source, wanted: Wanted
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a model to train, see `load_source`: all of its weights, or LoRA adapters on it.

    Adapters that are there go on, as they are; they are not replaced by new ones. Raises ValueError if they
    are of another shape than `wanted`, and for quantised weights, alpha or dropout without adapters.
    """
    found, tokenizer, adapter = _below(source)
    if adapter is not None:
        return with_adapter_on(found, adapter, wanted), tokenizer
    if wanted.rank:
        return with_lora(found, wanted.rank, wanted.alpha, wanted.dropout), tokenizer
    for name, given in (("lora_alpha", wanted.alpha), ("lora_dropout", wanted.dropout)):
        if given is not None:
            raise ValueError(
                f"{name}: expected lora_rank with it, or adapters at {source.model!r}; got {given:g} alone "
                f"(`{name}: null` in a --config takes back what a preset says)"
            )
    if source.bits:
        raise ValueError(
            f"{option_of(source.bits)}: expected lora_rank with it, or adapters at {source.model!r}, since "
            "quantised weights are not trained"
        )
    return found, tokenizer


def merge(source: Source, out: Path) -> None:
    """Write a folder of adapters as a model of its own with its tokenizer, whole or not at all.

    Raises ValueError for a model without adapters, and for an `out` that is there already.
    """
    if out.exists():
        raise ValueError(f"out: expected a folder that is not there yet, got {out}")
    if adapter_at(source.model, source.revision) is None:
        raise ValueError(f"model: expected adapters at {source.model!r}, got a model without any")
    model, tokenizer = load_source(source)
    with whole_folder(out) as temporary:
        write_student(model, tokenizer, temporary)


def _below(source: Source) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Adapter | None]:
    """A model without adapters, the tokenizer, and the adapters that belong on it."""
    quantized = quantization(source.bits, DTYPES[source.dtype])
    parts = _parts(source.model, source.gguf_file, source.revision)
    how = parts.where | ({} if quantized is None else {"quantization_config": quantized})
    how |= {} if source.attention is None else {"attn_implementation": source.attention}
    with _whole():
        found = from_files(parts.base, dtype=DTYPES[source.dtype], **how)
    if source.gguf_file is not None:
        found = plain(found)
    return (found if quantized is None else prepared(found)), parts.tokenizer, parts.adapter


@dataclass(frozen=True)
class _Parts:
    """What is known of a model before its weights are read.

    Args:
        base: folder or hub id of the model, below adapters if there are any.
        where: which files of it are meant.
        config: its configuration.
        tokenizer: the adapters' own if they have one.
        adapter: adapters that belong on it.
    """

    base: str
    where: dict[str, Any]
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter | None


def _parts(model: str, gguf_file: str | None, revision: str | None) -> _Parts:
    """Find the parts of a model. ValueError for what was expected and is not there."""
    is_folder, tokenizer = Path(model).is_dir(), None
    if not is_folder:  # from the hub a tokenizer first: without network its error is the one to be told
        tokenizer = _tokenizer(model, _where(model, gguf_file, revision))
    adapter = adapter_at(model, revision)
    base, where = model, _where(model, None if adapter else gguf_file, revision)
    if adapter is not None:
        if is_folder and _has(model, PARTS[1]):
            tokenizer = _tokenizer(model, where)
        base = adapter.base
        where = _where(base, gguf_file, adapter.base_revision or (revision if is_folder else None))
    if tokenizer is None:
        _check_has_tokenizer(base, where)
    config = configuration(base, **where)
    return _Parts(base, where, config, tokenizer or _tokenizer(base, where), adapter)


def _tokenizer(model: str, where: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer at `model`."""
    with expected("a tokenizer", model, where["gguf_file"] or PARTS[1][0]):
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False, **where)


def _check_has_tokenizer(model: str, where: dict[str, Any]) -> None:
    if where["gguf_file"] is None and Path(model).is_dir() and not _has(model, PARTS[1]):
        raise ValueError(f"model: {model} has no {PARTS[1][0]}")


@contextmanager
def _whole() -> Iterator[None]:
    """Inside, `from_pretrained` gives every process all of the weights, also where ZeRO-3 is configured.

    The model is evaluated and copied before it is sharded.
    """
    active = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = active


def load_reader(model: str, gguf_file: str | None = None, revision: str | None = None) -> Reader:
    """Load what reads without weights: the tokenizer, and the configuration for the model's sizes.

    Of weights only names and sizes are looked at. ValueError if they would not be loaded, as by `load`.
    """
    parts = _parts(model, gguf_file, revision)
    if gguf_file is None and Path(parts.base).is_dir():
        from_files(parts.base, device_map="meta", **parts.where)
    config = parts.config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    return Reader(parts.tokenizer, *sizes)


def _where(model: str, gguf_file: str | None, revision: str | None) -> dict[str, Any]:
    """What says which files of a model are meant. ValueError for a place that there is not."""
    if not Path(model).is_dir() and not HUB_ID.fullmatch(model):
        raise ValueError(f"model: expected a local folder or a hub id, got {model!r}, which is neither")
    if gguf_file is None and Path(model).is_dir():
        if not _has(model, PARTS[0]):
            raise ValueError(f"model: {model} has no {PARTS[0][0]}")
        check_files(Path(model))
    if gguf_file is not None and Path(model).is_dir() and not (Path(model) / gguf_file).is_file():
        raise ValueError(f"gguf_file: expected a file in {model}, got {gguf_file!r}, which is not there")
    return {"gguf_file": gguf_file, "revision": revision or "main"}


def _has(folder: str, names: Sequence[str]) -> bool:
    return any((Path(folder) / name).exists() for name in names)


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a fresh model of that class, without traces of the file they were loaded from."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    attention = model.config._attn_implementation
    twin = AutoModelForCausalLM.from_config(
        config, dtype=model.dtype, attn_implementation=attention, trust_remote_code=False
    )
    twin.load_state_dict(model.state_dict())
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin

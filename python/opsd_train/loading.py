"""Model and tokenizer from a folder, a hub id or a GGUF file, and LoRA adapters on top."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Of a folder's configuration and of its tokenizer, in any form, a file that there must be.
PARTS = (
    ("config.json", "adapter_config.json"),
    ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Reader:
    """Who reads: a tokenizer, and how many positions the model has, if its configuration says so."""

    tokenizer: PreTrainedTokenizerBase
    positions: int | None


def load(
    model: str, dtype: str = "float32", gguf_file: str | None = None, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer; code that comes with a model is never run.

    Args:
        model: a local folder or a hub id.
        dtype: `float32`, `bfloat16` or `float16`. Weights that are trained lose small updates in the others.
        gguf_file: name of a GGUF file in that folder; the weights are dequantised.
        revision: of a hub id, the commit, tag or branch to load.

    Raises:
        ValueError: what was expected at `model` and was not there.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}")
    where = _where(model, gguf_file, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, **where)
        with _whole():
            found = AutoModelForCausalLM.from_pretrained(
                model, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, **where
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"model: expected a causal language model at {model!r}; {error}") from error
    return (found if gguf_file is None else plain(found)), tokenizer


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
    """Load what reads without weights: the tokenizer, and the configuration for its number of positions."""
    where = _where(model, gguf_file, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, **where)
        config = AutoConfig.from_pretrained(model, trust_remote_code=False, **where)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: expected a tokenizer and a configuration at {model!r}; {error}") from error
    return Reader(tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None))


def _where(model: str, gguf_file: str | None, revision: str | None) -> dict[str, Any]:
    """What says which files of a model are meant. ValueError for a place that there is not."""
    if not Path(model).is_dir() and not HUB_ID.fullmatch(model):
        raise ValueError(f"model: expected a local folder or a hub id, got {model!r}, which is neither")
    if gguf_file is None and Path(model).is_dir():
        for names in PARTS:
            if not any((Path(model) / name).exists() for name in names):
                raise ValueError(f"model: {model} has no {names[0]}")
    if gguf_file is not None and Path(model).is_dir() and not (Path(model) / gguf_file).is_file():
        raise ValueError(f"gguf_file: expected a file in {model}, got {gguf_file!r}, which is not there")
    return {"gguf_file": gguf_file, "revision": revision or "main"}


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a fresh model of that class, without traces of the file they were loaded from."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    twin = AutoModelForCausalLM.from_config(config, dtype=model.dtype, trust_remote_code=False)
    twin.load_state_dict(model.state_dict())
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


def with_lora(model: PreTrainedModel, rank: int, alpha: float, dropout: float) -> PeftModel:
    """Put LoRA adapters on every linear layer but the head, which stays frozen with everything else."""
    if rank < 1:
        raise ValueError(f"lora_rank: expected at least 1, got {rank}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a ratio, which need not be whole
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)

"""Weights in 4 or 8 bits by bitsandbytes, on which LoRA adapters are trained (QLoRA)."""

from importlib.util import find_spec
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from torch.cuda import is_available
from transformers import BitsAndBytesConfig, PreTrainedModel


def option_of(bits: int) -> str:
    """The option that asks for it."""
    return f"load_in_{bits}bit"


def quantization(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What `from_pretrained` is told: NF4, or LLM.int8(), with products in `dtype`; None for 0 bits.

    Raises ValueError naming the option without bitsandbytes or a GPU.
    """
    if not bits:
        return None
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{option_of(bits)}: expected the package bitsandbytes, which is not installed "
            "(pip install bitsandbytes)"
        )
    if not is_available():
        raise ValueError(f"{option_of(bits)}: expected a GPU, found none")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    """A quantised model for training adapters on it: frozen, with norms and head in fp32."""
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the trainer's to switch


def check_quantized(bits: int, config: Any) -> None:
    """ValueError for an option of the run that quantised weights do not go with.

    Args:
        bits: 0, 4 or 8.
        config: of the run.
    """
    if not bits:
        return
    for name, fits, expected in (
        ("teacher", config.teacher not in ("ema", "sync"), "one that copies no weights"),
        ("rollouts", config.rollouts == "hf", "'hf', since an engine is sent the weights"),
        ("fsdp", not config.fsdp, "none"),
        ("deepspeed", not config.deepspeed, "none"),
    ):
        if not fits:
            got = getattr(config, name)
            raise ValueError(f"{name}: expected {expected}, with {option_of(bits)}; got {got!r}")

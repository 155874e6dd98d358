"""Checks of everything a caller passes: a ValueError names the argument, what was expected and what came."""

import math
from typing import Any

import torch

from opsd_kernels.sources import Hidden, Logits, Source

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IDS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
REDUCTIONS = ("mean", "sum", "none")


def as_source(name: str, value: Any, weight: torch.Tensor | None) -> Source:
    """A checked source; a bare tensor becomes hidden states of the shared head `weight`."""
    if isinstance(value, torch.Tensor):
        if weight is None:
            raise ValueError(
                f"weight: expected the head [V, H] that projects the hidden states `{name}`; got None "
                f"(for logits pass {name}=Logits(z))"
            )
        value = Hidden(value, weight)
    if isinstance(value, Hidden):
        _check_hidden(name, value)
    elif isinstance(value, Logits):
        _check_floats(f"{name}.z", value.z, "[..., V]", dims=None)
    else:
        raise ValueError(f"{name}: expected a tensor, Hidden or Logits; got {type(value).__name__}")
    return value


def check_weight_is_used(student: Any, teacher: Any, weight: torch.Tensor | None) -> None:
    """A head that no bare tensor needs is a mistake, not a spare."""
    if weight is not None and not any(isinstance(x, torch.Tensor) for x in (student, teacher)):
        raise ValueError(
            "weight: expected None, since student and teacher are sources of their own; got a tensor"
        )


def common_vocab(student: Source, teacher: Source, vocab_size: int | None) -> int:
    """V, after checking that both sources have it (or at least `vocab_size`, which cuts padding off)."""
    if vocab_size is None:
        if student.vocab != teacher.vocab:
            raise ValueError(
                f"teacher: expected the student's vocabulary of {student.vocab} columns; got {teacher.vocab} "
                "(if one is padded, pass vocab_size=the tokenizer's size)"
            )
        return student.vocab
    smaller = min(student.vocab, teacher.vocab)
    if type(vocab_size) is not int or not 1 <= vocab_size <= smaller:
        raise ValueError(
            f"vocab_size: expected an int in [1, {smaller}], the smaller vocabulary; got {vocab_size}"
        )
    return vocab_size


def check_pair(student: Source, teacher: Source) -> None:
    """Same token dimensions, one device, and no gradient expected of the teacher."""
    if student.lead != teacher.lead:
        raise ValueError(
            f"teacher: expected the student's token dimensions {tuple(student.lead)}; "
            f"got {tuple(teacher.lead)}"
        )
    named = [
        (f"{side}.{field}", value)
        for side, source in (("student", student), ("teacher", teacher))
        for field, value in vars(source).items()
        if isinstance(value, torch.Tensor)
    ]
    for name, tensor in named:
        _check_device(name, tensor, named[0][1].device)
    rows = teacher.hidden if isinstance(teacher, Hidden) else teacher.z
    if rows.requires_grad:
        raise ValueError(
            "teacher: expected a tensor without gradient (only the student is trained); got "
            "requires_grad=True: compute it under torch.no_grad() or detach it"
        )


def check_rows(
    name: str, tensor: torch.Tensor | None, source: Source, dtypes: tuple[torch.dtype, ...]
) -> None:
    """A constant per-token tensor: the source's token dimensions and device, a dtype among `dtypes`."""
    if tensor is None:
        return
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor or None; got {type(tensor).__name__}")
    if tensor.shape != source.lead:
        raise ValueError(f"{name}: expected shape {tuple(source.lead)}; got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}; got {tensor.dtype}")
    first = source.tensors[0]
    assert first is not None
    _check_device(name, tensor, first.device)
    if tensor.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor without gradient, it is constant here; got requires_grad=True: "
            "detach it"
        )


def check_ids(token_ids: torch.Tensor | None, mask: torch.Tensor | None, vocab: int) -> None:
    """Unmasked ids within the vocabulary. On a CPU only: elsewhere reading them would wait for the device."""
    if token_ids is None or token_ids.device.type != "cpu":
        return
    if mask is not None:
        token_ids = token_ids[mask]
    if token_ids.numel() == 0:
        return
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"token_ids: expected ids in [0, {vocab}); got a range of [{low}, {high}]")


def check_reduction(reduction: str, denominator: Any) -> None:
    """A known reduction, and a positive denominator with `"mean"` only."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if denominator is None:
        return
    if reduction != "mean":
        raise ValueError(f"denominator: expected None with reduction={reduction!r}; got {denominator}")
    if isinstance(denominator, torch.Tensor):
        if denominator.numel() != 1 or denominator.requires_grad:
            raise ValueError(
                "denominator: expected a number or a constant tensor of one element; got shape "
                f"{tuple(denominator.shape)}, requires_grad={denominator.requires_grad}"
            )
        if denominator.device.type == "cpu":  # elsewhere reading it would wait for the device
            check_positive("denominator", denominator.item())
    else:
        check_positive("denominator", denominator)


def check_positive(name: str, value: Any) -> None:
    """A finite number above 0."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (value > 0 and math.isfinite(value))
    ):
        raise ValueError(f"{name}: expected a finite number above 0; got {value!r}")


def _check_hidden(name: str, source: Hidden) -> None:
    _check_floats(f"{name}.hidden", source.hidden, "[..., H]", dims=None)
    _check_floats(f"{name}.weight", source.weight, "[V, H]", dims=2)
    if source.hidden.shape[-1] != source.weight.shape[1]:
        raise ValueError(
            f"{name}.hidden: expected last dimension H = {source.weight.shape[1]} of weight "
            f"{tuple(source.weight.shape)}; got {tuple(source.hidden.shape)}"
        )
    if source.bias is not None:
        _check_floats(f"{name}.bias", source.bias, "[V]", dims=1)
        if source.bias.shape[0] != source.vocab:
            raise ValueError(f"{name}.bias: expected shape ({source.vocab},); got {tuple(source.bias.shape)}")
    check_positive(f"{name}.logit_scale", source.logit_scale)
    if source.softcap is not None:
        check_positive(f"{name}.softcap", source.softcap)


def _check_floats(name: str, tensor: Any, shape: str, dims: int | None) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor {shape}; got {type(tensor).__name__}")
    if hasattr(tensor, "device_mesh"):
        raise ValueError(
            f"{name}: expected a plain tensor {shape}; got a DTensor: gather it with .full_tensor() first"
        )
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: expected a floating-point dtype; got {tensor.dtype}")
    if (dims is not None and tensor.dim() != dims) or tensor.dim() == 0:
        raise ValueError(f"{name}: expected shape {shape}; got {tuple(tensor.shape)}")
    if (dims is not None and tensor.numel() == 0) or tensor.shape[-1] == 0:
        raise ValueError(
            f"{name}: expected a non-empty {shape}; got {tuple(tensor.shape)} (a parameter sharded by ZeRO-3 "
            "is empty outside deepspeed.zero.GatheredParameters)"
        )


def _check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} of the student; got {tensor.device}")

"""The elementary checks: a ValueError names the argument, what was expected and what came."""

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IDS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def check_rows(
    name: str, tensor: Any, lead: torch.Size, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    """A constant per-token tensor: the source's token dimensions and device, a dtype among `dtypes`."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor or None; got {type(tensor).__name__}")
    if tensor.shape != lead:
        raise ValueError(f"{name}: expected shape {tuple(lead)}; got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}; got {tensor.dtype}")
    check_device(name, tensor, device)
    if tensor.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor without gradient, it is constant here; got requires_grad=True: "
            "detach it"
        )


def check_ids(name: str, ids: Tensor | None, low: int, high: int) -> None:
    """Ids in [low, high). On a CPU only: elsewhere reading them would wait for the device."""
    if ids is None or not readable(ids) or ids.numel() == 0:
        return
    least, most = int(ids.min()), int(ids.max())
    if least < low or most >= high:
        raise ValueError(f"{name}: expected ids in [{low}, {high}); got a range of [{least}, {most}]")


def check_positive(name: str, value: Any) -> None:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0; got {value!r}")


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at: a GPU would have to be waited for, a compiled graph has none."""
    real = not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)
    return real and tensor.device.type == "cpu"


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """On the student's device."""
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} of the student; got {tensor.device}")

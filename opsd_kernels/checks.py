"""The elementary checks: a ValueError names the argument, what was expected and what came."""

import sys
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IDS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
SMALLEST_SCALE, LARGEST_SCALE = 1e-6, 1e6
_FORWARD_MODE = "one with a tangent: there is no forward-mode derivative; detach it or take the backward"


def check_rows(
    name: str, tensor: Any, lead: torch.Size, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    """A constant per-token tensor: the source's token dimensions and device, a dtype among `dtypes`."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor or None; got {type(tensor).__name__}")
    check_plain(name, tensor)
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


def check_plain(name: str, tensor: Tensor) -> None:
    """Dense memory that holds values, and no transform that the operators do not know."""
    # While a graph is compiled tangents cannot be seen, but that some are asked for.
    compiling = torch.compiler.is_compiling()
    unlike = _FORWARD_MODE if forward_ad._current_level >= 0 and compiling else None
    unlike = unlike if compiling else _unlike_plain(tensor)
    if unlike is not None:
        raise ValueError(f"{name}: expected a plain dense tensor, on cpu or cuda say; got {unlike}")


def _unlike_plain(tensor: Tensor) -> str | None:
    """What keeps the engine from reading the tensor as rows of numbers; None if nothing does."""
    if tensor.is_nested:
        return "a nested tensor: pad it, and pass the mask of what is real"
    if tensor.is_quantized:
        return f"a quantized one ({tensor.dtype}): take its .dequantize()"
    if tensor.layout != torch.strided:
        return f"one of layout {tensor.layout}: take its .to_dense()"
    if tensor.device.type == "meta":
        return "one on meta, without values"
    if _functorch.is_batchedtensor(tensor):
        return "one inside torch.vmap: token dimensions may be of any number, so pass all rows at once"
    if _functorch.is_gradtrackingtensor(tensor):
        return "one inside a torch.func transform (grad, vjp, jvp): take torch.autograd on plain tensors"
    # Nothing propagates a tangent, so the loss's would be 0 in silence.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        return _FORWARD_MODE
    return None


def is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold: an int may be beyond it."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -sys.float_info.max <= value <= sys.float_info.max


def shown(value: Any) -> str:
    """A value for a message; an int of thousands of digits cannot be written out."""
    beyond = isinstance(value, int) and value.bit_length() > 64
    return f"an int of {value.bit_length()} bits" if beyond else repr(value)


def check_positive(name: str, value: Any) -> None:
    """A finite number above 0."""
    if not is_finite(value) or value <= 0:
        raise ValueError(f"{name}: expected a finite number above 0; got {shown(value)}")


def check_scale(name: str, value: Any) -> None:
    """A number that may multiply or divide logits: beyond these bounds fp32 has no gradient left."""
    check_positive(name, value)
    if not SMALLEST_SCALE <= value <= LARGEST_SCALE:
        raise ValueError(
            f"{name}: expected a finite number above 0, in [{SMALLEST_SCALE:g}, {LARGEST_SCALE:g}]; "
            f"got {value!r}"
        )


def readable(tensor: Tensor, waits: bool = False) -> bool:
    """Whether values can be looked at: a GPU would have to be waited for, a compiled graph has none.

    `waits` says that the call waits for the device in any case.
    """
    real = not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)
    return real and (waits or tensor.device.type == "cpu")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """On the student's device."""
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} of the student; got {tensor.device}")

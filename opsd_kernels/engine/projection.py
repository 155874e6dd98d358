"""From a source to logits: the matrix products of the engine, and nothing else."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels.sources import Hidden, Logits, Source

NARROW = (torch.float16, torch.bfloat16)


def keeps_operands(device: torch.device) -> bool:
    """Whether the device multiplies 2-byte operands into an fp32 result: there they are never widened."""
    return device.type == "cuda"


def mm_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b, computed and stored in `out`'s dtype.

    On CUDA 2-byte operands stay as they are and the GEMM emits fp32: casting them would run it at the fp32
    rate. Elsewhere the operands are cast, since no such GEMM exists; those in `out`'s dtype cost nothing.
    """
    if out.is_cuda and a.dtype == b.dtype and a.dtype in NARROW and out.dtype == torch.float32:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)
    if accumulate:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


@dataclass(frozen=True)
class Setting:
    """What every projection of a problem shares.

    Args:
        rows: `[n]` indices of the live rows, None for all.
        temperature: T.
        dtype: dtype of logits and accumulators.
        operand: dtype to which operands are rounded where the device gains by it (autocast), or None.
    """

    rows: Tensor | None
    temperature: float
    dtype: torch.dtype
    operand: torch.dtype | None = None

    def take(self, tensor: Tensor, span: slice) -> Tensor:
        """The live rows `span` of a tensor with a row per token."""
        return tensor[span] if self.rows is None else tensor.index_select(0, self.rows[span])

    def head_dtype(self, weight: Tensor) -> torch.dtype:
        """In which dtype a head is multiplied: its own or autocast's on CUDA, the logits' elsewhere."""
        if self.dtype != torch.float32 or not keeps_operands(weight.device):
            return self.dtype
        if self.operand is not None and weight.dtype == torch.float32:
            return self.operand
        return weight.dtype


@dataclass(frozen=True)
class Projection:
    """A source ready for repeated GEMMs: its head is in the dtype in which it is multiplied."""

    source: Source
    setting: Setting

    @classmethod
    def prepare(cls, source: Source, setting: Setting) -> "Projection":
        """Casts the head once instead of once a chunk."""
        if isinstance(source, Hidden):
            weight = source.weight.to(setting.head_dtype(source.weight))
            source = source.with_tensors([source.hidden, weight, *source.tensors[2:]])
        return cls(source, setting)

    def logits_(self, out: Tensor, span: slice, columns: slice, z_s: Tensor | None = None) -> None:
        """Writes z / T of the live rows `span` and the vocabulary `columns` into `out`.

        Args:
            out: `[rows, columns]` in the setting's dtype.
            span: of live rows.
            columns: of the vocabulary.
            z_s: the student's logits of the same rows and columns, for teachers that are made of them.
        """
        source = self.source
        if isinstance(source, Logits):
            out.copy_(self.setting.take(source.z[:, columns], span))
        else:
            weight = source.weight[columns]
            mm_(out, self.setting.take(source.hidden, span).to(weight.dtype), weight.T)
            if source.bias is not None:
                out += source.bias[columns]
            scale_and_cap_(out, source)
        if self.setting.temperature != 1:
            out /= self.setting.temperature

    @property
    def slope(self) -> float:
        """d(z / T) / d(hidden @ weight.T + bias), the soft-cap aside."""
        scale = self.source.logit_scale if isinstance(self.source, Hidden) else 1.0
        return scale / self.setting.temperature

    @property
    def cap(self) -> float | None:
        """Soft-cap of z / T; its slope there is 1 - (z / T / cap)^2."""
        if not isinstance(self.source, Hidden) or self.source.softcap is None:
            return None
        return self.source.softcap / self.setting.temperature

    @property
    def operand_dtype(self) -> torch.dtype:
        """In which dtype dlogits are multiplied: on CUDA they are rounded to the head's, once."""
        return self.source.weight.dtype if isinstance(self.source, Hidden) else self.setting.dtype

    def hidden(self, span: slice) -> Tensor:
        """`[C, H]` hidden states of live rows, as an operand."""
        assert isinstance(self.source, Hidden)
        return self.setting.take(self.source.hidden, span).to(self.source.weight.dtype)


def scale_and_cap_(z: Tensor, head: Hidden) -> None:
    """What follows `hidden @ weight.T + bias`, in place."""
    if head.logit_scale != 1:
        z *= head.logit_scale
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)

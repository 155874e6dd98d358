"""From a source to logits and back: the GEMMs of the engine, and nothing else."""

from dataclasses import dataclass

import torch

from opsd_kernels.sources import Hidden, Logits, Source


def mm_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b, computed and stored in `out`'s dtype.

    On CUDA 2-byte operands stay as they are and the GEMM emits fp32: casting them would run it at the fp32
    rate. Elsewhere the operands are cast, since no such GEMM exists; those in `out`'s dtype cost nothing.
    """
    if out.is_cuda and a.dtype == b.dtype != out.dtype:
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
class Projection:
    """A source ready for repeated GEMMs.

    Args:
        source: flattened source.
        rows: `[n]` indices of the live rows, None for all.
        temperature: T.
        dtype: dtype of logits and accumulators.
    """

    source: Source
    rows: torch.Tensor | None
    temperature: float
    dtype: torch.dtype

    @classmethod
    def prepare(
        cls, source: Source, rows: torch.Tensor | None, temperature: float, dtype: torch.dtype
    ) -> "Projection":
        """Where the device has no mixed-dtype GEMM, casts the head once instead of once a chunk."""
        if isinstance(source, Hidden) and not source.weight.is_cuda and source.weight.dtype != dtype:
            source = source.with_tensors(source.hidden, source.weight.to(dtype), source.bias)
        return cls(source, rows, temperature, dtype)

    def logits_(self, out: torch.Tensor, span: slice, columns: slice) -> None:
        """Writes z / T of the live rows `span` and the vocabulary `columns` into `out`."""
        source = self.source
        if isinstance(source, Logits):
            out.copy_(self._take(source.z[:, columns], span))
        else:
            mm_(out, self._take(source.hidden, span), source.weight[columns].T)
            if source.bias is not None:
                out += source.bias[columns]
            if source.logit_scale != 1:
                out *= source.logit_scale
            if source.softcap is not None:
                out.div_(source.softcap).tanh_().mul_(source.softcap)
        if self.temperature != 1:
            out /= self.temperature

    @property
    def slope(self) -> float:
        """d(z / T) / d(hidden @ weight.T + bias), the soft-cap aside."""
        scale = self.source.logit_scale if isinstance(self.source, Hidden) else 1.0
        return scale / self.temperature

    def through_cap_(self, dz: torch.Tensor, z: torch.Tensor) -> None:
        """Multiplies `dz` by the soft-cap's slope 1 - (z / softcap)^2; `z` holds z / T and is used up."""
        if isinstance(self.source, Hidden) and self.source.softcap is not None:
            ratio = z.mul_(self.temperature / self.source.softcap)
            dz.addcmul_(dz, ratio.square_(), value=-1)

    def operand(self, dz: torch.Tensor) -> torch.Tensor:
        """`dz` in the dtype in which the device multiplies it with the head: on CUDA rounded to it, once."""
        if dz.is_cuda and isinstance(self.source, Hidden):
            return dz.to(self.source.weight.dtype)
        return dz

    def hidden(self, span: slice) -> torch.Tensor:
        """`[C, H]` hidden states of live rows."""
        assert isinstance(self.source, Hidden)
        return self._take(self.source.hidden, span)

    def _take(self, tensor: torch.Tensor, span: slice) -> torch.Tensor:
        return tensor[span] if self.rows is None else tensor.index_select(0, self.rows[span])


def prepare_pair(
    student: Source, teacher: Source, rows: torch.Tensor | None, temperature: float, dtype: torch.dtype
) -> tuple[Projection, Projection]:
    """Student's and teacher's projection; a head that both use, sliced or detached perhaps, is cast once."""
    first = Projection.prepare(student, rows, temperature, dtype)
    if (
        isinstance(student, Hidden)
        and isinstance(teacher, Hidden)
        and isinstance(first.source, Hidden)
        and teacher.weight.dtype == student.weight.dtype
        and teacher.weight.is_set_to(student.weight)
    ):
        teacher = teacher.with_tensors(teacher.hidden, first.source.weight, teacher.bias)
    return first, Projection.prepare(teacher, rows, temperature, dtype)

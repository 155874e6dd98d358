"""Accumulators of the student's gradients, and the filter that leaves dead columns out of their GEMMs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels.engine.problem import Problem
from opsd_kernels.engine.projection import Projection, mm_
from opsd_kernels.sources import Hidden


@dataclass
class Gradients:
    """Accumulators in `problem.dtype` for the student's tensors; None where no gradient is wanted.

    dW is summed over the chunks in fp32, whatever the head's dtype, so its error does not grow with them.

    Args:
        rows: `[n]` indices of the live rows, None for all.
        hidden: `[N, H]`.
        weight: `[V, H]`.
        bias: `[V]`.
        z: `[N, V]`, for logits.
    """

    rows: Tensor | None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    z: Tensor | None = None

    @classmethod
    def of(cls, problem: Problem, wanted: list[bool]) -> "Gradients":
        """Zeros where a row or column may stay unwritten, else uninitialised memory."""
        student, like = problem.student, problem.like
        covered = problem.rows is None and problem.live_rows > 0
        allocate = torch.empty if covered else torch.zeros
        if not isinstance(student, Hidden):
            return cls(problem.rows, z=allocate(student.tensors[0].shape, **like) if wanted[0] else None)
        written = problem.live_rows > 0 and problem.options.grad_filter is None
        allocate_head = torch.empty if written else torch.zeros
        return cls(
            problem.rows,
            hidden=allocate(student.hidden.shape, **like) if wanted[0] else None,
            weight=allocate_head(student.weight.shape, **like) if wanted[1] else None,
            bias=torch.zeros(problem.vocab, **like) if student.bias is not None and wanted[2] else None,
        )

    def add_(self, student: Projection, dz: Tensor, span: slice) -> None:
        """Adds a chunk's part; `dz` `[C, V]` is the gradient of `hidden @ weight.T + bias`, or of z."""
        if self.z is not None:
            self._put(self.z, dz, span)
            return
        source = student.source
        assert isinstance(source, Hidden)
        self._add_hidden(dz, source.weight, span)
        if self.weight is not None:
            mm_(self.weight, dz.T, student.hidden(span), accumulate=span.start > 0)
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)

    def add_filtered_(self, student: Projection, dz: Tensor, span: slice, live: Tensor) -> Tensor:
        """As `add_` with the columns that are `live` `[V]` alone in the GEMMs; `[C]` share of |dz| left out.

        The gathered columns make dense products; skipping tiles of the whole ones would save nothing, since
        almost every tile has a live column.
        """
        source = student.source
        assert isinstance(source, Hidden)
        columns = live.nonzero()[:, 0]
        kept = dz.index_select(1, columns)
        self._add_hidden(kept, source.weight.index_select(0, columns), span)
        if self.weight is not None:
            part = self.weight.index_select(0, columns)
            mm_(part, kept.T, student.hidden(span), accumulate=True)
            self.weight.index_copy_(0, columns, part)
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)
        wide = torch.promote_types(dz.dtype, torch.float32)
        whole, rest = (torch.linalg.vector_norm(x, 1, dim=1, dtype=wide) for x in (dz, kept))
        return torch.where(whole > 0, 1 - rest / whole, 0.0).clamp(min=0)

    def scale_(self, factor: Tensor | None) -> None:
        """Multiplies everything by what `safe_unit` took out."""
        if factor is None:
            return
        for tensor in (self.hidden, self.weight, self.bias, self.z):
            if tensor is not None:
                tensor *= factor

    def as_list(self, count: int) -> list[Tensor | None]:
        """In the order of the source's `tensors`, `count` of them."""
        return [self.z] if count == 1 else [self.hidden, self.weight, self.bias][:count]

    def _add_hidden(self, dz: Tensor, weight: Tensor, span: slice) -> None:
        if self.hidden is None:
            return
        if self.rows is None:
            mm_(self.hidden[span], dz, weight)
        else:
            part = torch.empty(dz.shape[0], weight.shape[1], dtype=self.hidden.dtype, device=dz.device)
            mm_(part, dz, weight)
            self._put(self.hidden, part, span)

    def _put(self, whole: Tensor, part: Tensor, span: slice) -> None:
        if self.rows is None:
            whole[span] = part
        else:
            whole.index_copy_(0, self.rows[span], part)


def safe_unit(scale: Tensor, operand: torch.dtype) -> Tensor | None:
    """A power of two near the largest |scale| `[n]`, to be taken out of fp16 operands; None for other dtypes.

    The weights or upstream gradients of a long batch may be 1e-6, and gradients times that would underflow.
    """
    if operand != torch.float16 or scale.numel() == 0:
        return None
    largest = scale.abs().amax()
    _, exponent = torch.frexp(torch.where(largest > 0, largest, 1.0))
    return torch.ldexp(torch.ones_like(largest), exponent)

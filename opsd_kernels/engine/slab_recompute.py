"""Design B: the forward keeps seven numbers a row, the backward recomputes logits by slabs of the vocabulary.

Six GEMMs instead of four, for per-token losses whose upstream gradients are only known in the backward, and
for budgets too tight for chunks of rows. dW is written slab by slab, each with one product over all rows.
"""

from types import ModuleType

import torch
from torch import Tensor

from opsd_kernels.backends import WITHOUT_SLABS
from opsd_kernels.engine import chunk_store, plan
from opsd_kernels.engine.chunk_store import Chunks
from opsd_kernels.engine.gradients import Gradients, safe_unit
from opsd_kernels.engine.problem import Problem
from opsd_kernels.engine.projection import Projection, mm_
from opsd_kernels.engine.rows import GradientForm, RowStatistics
from opsd_kernels.engine.teachers import needs_whole_rows, prepare
from opsd_kernels.sources import Hidden

FIELDS = len(RowStatistics._fields)


def forward(problem: Problem, backend: ModuleType, with_stats: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """`[n, 7]` row statistics of the live rows in fp64, `RowStatistics` by columns, and token statistics.

    Where the backward will walk whole rows, only the losses are kept.
    """
    if problem.options.backend in WITHOUT_SLABS:
        raise ValueError(
            f"backend: expected 'triton' or 'torch' for a loss per token; got {problem.options.backend!r}"
        )
    chunks = Chunks.of(problem, backend)
    rows, stats = [], []
    for span in chunks.spans:
        z_s, z_t = chunks.store.fill_(span)
        if with_stats:
            stats.append(chunk_store.row_stats(problem, backend, z_s, z_t, span))
        if by_slabs(problem):
            columns = backend.row_loss(z_s, z_t, problem.objective)
        else:
            loss = chunk_store.row_loss(problem, backend, problem.objective, z_s, z_t, span)
            columns = [loss] + [torch.zeros_like(loss)] * (FIELDS - 1)
        rows.append(torch.stack([column.double() for column in columns], dim=1))
    empty = torch.empty(0, FIELDS, dtype=torch.float64, device=problem.device)
    return torch.cat(rows) if rows else empty, chunk_store.joined(stats)


def by_slabs(problem: Problem) -> bool:
    """Whether the gradient of some columns needs no logits of the others, only the row statistics."""
    objective = problem.objective
    whole = objective.support is not None or objective.ratio_bound is not None
    return not whole and not needs_whole_rows(problem.teacher)


def backward(
    problem: Problem,
    backend: ModuleType,
    statistics: Tensor,
    upstream: Tensor,
    wanted: list[bool],
) -> list[Tensor | None]:
    """Gradients of the student's tensors in `problem.dtype` and their shapes; None where not wanted.

    Args:
        problem: the work.
        backend: module of row functions.
        statistics: `[n, 7]` of the live rows, as `forward` returned them.
        upstream: `[n]` gradient of each live row's loss.
        wanted: for each of the student's tensors, whether its gradient is needed.
    """
    gradients = Gradients.of(problem, wanted)
    student, teacher = prepare(problem)
    form = GradientForm(student.operand_dtype, student.cap)
    unit = safe_unit(upstream, form.dtype)
    upstream = upstream if unit is None else upstream / unit
    if not by_slabs(problem):
        _by_rows(problem, backend, upstream, gradients)
        gradients.scale_(unit)
        return gradients.as_list(len(wanted))
    everything = slice(0, problem.live_rows)
    live_hidden = _LiveHidden.of(problem, gradients)
    buffers = torch.empty(2, problem.live_rows * plan.slab_columns(problem), **problem.like)
    row = _row_statistics(statistics, problem.dtype)
    for columns in plan.spans(problem.vocab, plan.slab_columns(problem)):
        shape = problem.live_rows, columns.stop - columns.start
        z_s, z_t = buffers[:, : shape[0] * shape[1]].view(2, *shape)
        student.logits_(z_s, everything, columns)
        teacher.logits_(z_t, everything, columns, z_s)
        coefficient = upstream * student.slope
        dz = backend.slab_gradient_(z_s, z_t, problem.objective, row, coefficient, form)
        _add_slab_(gradients, student, dz, columns, live_hidden)
    live_hidden.finish(gradients)
    gradients.scale_(unit)
    return gradients.as_list(len(wanted))


class _LiveHidden:
    """dH of the live rows, summed over the slabs; spread over all rows at the end."""

    def __init__(self, target: Tensor | None) -> None:
        self.target = target

    @classmethod
    def of(cls, problem: Problem, gradients: Gradients) -> "_LiveHidden":
        if gradients.hidden is None:
            return cls(None)
        return cls(torch.zeros(problem.live_rows, gradients.hidden.shape[1], **problem.like))

    def finish(self, gradients: Gradients) -> None:
        if self.target is None or gradients.hidden is None:
            return
        if gradients.rows is None:
            gradients.hidden = self.target
        else:
            gradients.hidden.index_copy_(0, gradients.rows, self.target)


def _row_statistics(statistics: Tensor, dtype: torch.dtype) -> RowStatistics:
    """By fields; the two sums stay in fp64."""
    row = RowStatistics(*statistics.unbind(1))
    narrow = {name: getattr(row, name).to(dtype) for name in ("loss", "top_s", "top_t", "total", "scale")}
    return row._replace(**narrow)


def _by_rows(problem: Problem, backend: ModuleType, upstream: Tensor, gradients: Gradients) -> None:
    """Walks chunks of rows once more, now that the upstream gradient is known."""
    chunks = Chunks.of(problem, backend, trainable_head=True)
    form = GradientForm(chunks.student.operand_dtype, chunks.student.cap)
    for span in chunks.spans:
        z_s, z_t = chunks.store.fill_(span)
        coefficient = upstream[span] * chunks.student.slope
        _, dz = chunk_store.row_gradient_(
            problem, backend, problem.objective, z_s, z_t, span, coefficient, form
        )
        gradients.add_(chunks.student, dz, span)


def _add_slab_(
    gradients: Gradients,
    student: Projection,
    dz: Tensor,
    columns: slice,
    live_hidden: _LiveHidden,
) -> None:
    if gradients.z is not None:
        if gradients.rows is None:
            gradients.z[:, columns] = dz
        else:
            gradients.z[gradients.rows, columns] = dz
        return
    source = student.source
    assert isinstance(source, Hidden)
    rows = slice(0, dz.shape[0])
    if live_hidden.target is not None:
        mm_(live_hidden.target, dz, source.weight[columns], accumulate=True)
    if gradients.weight is not None:
        mm_(gradients.weight[columns], dz.T, student.hidden(rows))
    if gradients.bias is not None:
        gradients.bias[columns] = dz.sum(0, dtype=gradients.bias.dtype)

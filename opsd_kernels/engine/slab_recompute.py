"""Design B: the forward keeps seven numbers a row, the backward recomputes logits by slabs of the vocabulary.

Six GEMMs instead of four, for per-token losses whose upstream gradients are only known in the backward.
"""

from types import ModuleType
from typing import Any

import torch

from opsd_kernels.engine import plan
from opsd_kernels.engine.chunk_store import ALL, Chunks
from opsd_kernels.engine.problem import Problem
from opsd_kernels.engine.projection import Projection, mm_, prepare_pair
from opsd_kernels.engine.rows import RowStatistics
from opsd_kernels.sources import Hidden


def forward(problem: Problem, backend: ModuleType) -> RowStatistics:
    """The row statistics of all live rows, each `[n]`; `.loss` is the token loss."""
    chunks = Chunks.of(problem)
    parts = [backend.row_loss(*chunks.logits(span), problem.objective) for span in chunks.spans]
    if not parts:
        parts = [backend.row_loss(*chunks.logits(slice(0, 0)), problem.objective)]
    return RowStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def backward(
    problem: Problem,
    backend: ModuleType,
    statistics: RowStatistics,
    upstream: torch.Tensor,
    wanted: tuple[bool, ...],
) -> list[torch.Tensor | None]:
    """Gradients of the student's tensors in `problem.dtype`, those of hidden states and logits for live rows.

    Args:
        problem: the work.
        backend: module with `slab_gradient_`.
        statistics: what `forward` returned.
        upstream: `[n]` gradient of each live row's loss.
        wanted: for each of `problem.student.tensors`, whether its gradient is needed.
    """
    student, teacher = prepare_pair(
        problem.student, problem.teacher, problem.rows, problem.temperature, problem.dtype
    )
    n, itemsize, device_type = problem.live_rows, problem.dtype.itemsize, problem.device.type
    budget = plan.workspace_bytes(problem.workspace_bytes, problem.vocab, itemsize, device_type, False)
    width = plan.length(problem.vocab, max(n, 1) * itemsize, budget)
    like: dict[str, Any] = {"dtype": problem.dtype, "device": problem.device}
    outputs = [
        None if tensor is None or not want else torch.zeros(_live_shape(tensor, i, n), **like)
        for i, (tensor, want) in enumerate(zip(problem.student.tensors, wanted, strict=True))
    ]
    buffers = torch.empty(2, n * width, **like)
    for columns in plan.spans(problem.vocab, width):
        slab = columns.stop - columns.start
        z_s, z_t = buffers[:, : n * slab].view(2, n, slab)
        student.logits_(z_s, ALL, columns)
        teacher.logits_(z_t, ALL, columns)
        backend.slab_gradient_(z_s, z_t, problem.objective, statistics, upstream * student.slope)
        student.through_cap_(z_t, z_s)
        _add_slab_(outputs, student, z_t, columns)
    return outputs


def _live_shape(tensor: torch.Tensor, index: int, n: int) -> tuple[int, ...]:
    """Shape of the gradient of the index-th tensor of a source: the first one is a row per token."""
    return (n, *tensor.shape[1:]) if index == 0 else tuple(tensor.shape)


def _add_slab_(
    outputs: list[torch.Tensor | None], student: Projection, dz: torch.Tensor, columns: slice
) -> None:
    if not isinstance(student.source, Hidden):
        (z,) = outputs
        if z is not None:
            z[:, columns] = dz
        return
    hidden, weight, bias = outputs
    operand = student.operand(dz)
    if hidden is not None:
        mm_(hidden, operand, student.source.weight[columns], accumulate=True)
    if weight is not None:
        mm_(weight[columns], operand.T, student.hidden(ALL))
    if bias is not None:
        bias[columns] = dz.sum(0)

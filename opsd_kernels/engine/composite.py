"""Several terms over the same student row: one student GEMM, one per teacher, one dH and one dW for them all.

Divergences have dense gradients. Log-probabilities of a few entries, from which estimators are made, have
gradients in a row's normaliser and those entries: e_k (1[v = id_k] - s_v) for dL/dlog s_k = e_k. All of a
row's gradients are added before the two matrix products.

The loss is L = sum_d w_d D_d + E(log s at the entries). Where w and E are known row by row, the gradient is
formed in the forward (`loss_and_gradients`, design A). Otherwise `values` returns every D_d and log s, which
plain PyTorch combines, and `gradients` recomputes the logits once the upstream gradients are there.
"""

from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from opsd_kernels.engine import chunk_store
from opsd_kernels.engine.composite_chunk import Buffers, Chunk, Values, Walk
from opsd_kernels.engine.gradients import Gradients, safe_unit
from opsd_kernels.engine.parts import Parts, widths
from opsd_kernels.engine.problem import Problem
from opsd_kernels.engine.rows import GradientForm


class Combination(Protocol):
    """How a recipe makes a token loss of the parts, row by row; all without autograd around it."""

    @property
    def needs_stats(self) -> bool:
        """Whether weights are made of token statistics."""
        ...

    @property
    def largest(self) -> Tensor:
        """`[N]` about the largest |weight|, by which the operands of fp16 products are scaled."""
        ...

    def weights(self, stats: dict[str, Tensor] | None, rows: Tensor) -> Tensor:
        """`[C, D]` factors of the divergences; `rows` are the tokens' indices in the call."""
        ...

    def estimate(
        self, values: Values, stats: dict[str, Tensor] | None, rows: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """`[C]` what the entries add to each token's loss, and its derivatives `[C, K]` by log s."""
        ...


def loss_and_gradients(
    problem: Problem, backend: ModuleType, combination: Combination, wanted: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Sum of the token losses and its gradients by the student's tensors, as `chunk_store` returns them."""
    walk = Walk.of(problem, backend)
    gradients = Gradients.of(problem, wanted) if any(wanted) else None
    unit = safe_unit(combination.largest, walk.student.operand_dtype)
    total = torch.zeros((), **problem.like)
    for span in walk.spans:
        chunk, rows = Chunk(walk, span), problem.index(span)
        stats = chunk.stats() if combination.needs_stats else None
        weights = combination.weights(stats, rows)
        values = _values(chunk, only_constant=gradients is not None)
        entries, slopes = combination.estimate(values, stats, rows)
        if gradients is None:
            losses = values.dense
        else:
            losses, dz = _gradient_(chunk, weights, values, slopes, unit)
            gradients.add_(walk.student, dz, span)
            chunk.buffers.give(dz)
        total += chunk_store.weighted(losses, weights).sum() + entries.sum()
        chunk.close()
    if gradients is None:
        return total, []
    gradients.scale_(unit)
    return total, gradients.as_list(len(wanted))


def values(problem: Problem, backend: ModuleType) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the live rows: divergences `[n, D]`, log s and log t `[n, K]` of all entries in fp64, ids `[n, K]`.

    The entries of the gathers stand side by side; ids are -1 where there is none, log t NaN without teacher.
    """
    walk = Walk.of(problem, backend)
    found = []
    for span in walk.spans:
        chunk = Chunk(walk, span)
        dense, gathered = _values(chunk, only_constant=False)
        chunk.close()
        ids = [g.ids.masked_fill(~g.valid, -1) for g in gathered]
        log_t = [torch.full_like(g.log_s, torch.nan) if g.log_t is None else g.log_t for g in gathered]
        sides = [g.log_s for g in gathered], log_t, ids
        found.append((dense, *[torch.cat(side, 1) if side else dense[:, :0] for side in sides]))
    if not found:
        entries = sum(_widths(problem, walk.parts))
        none = torch.empty(0, entries, dtype=torch.float64, device=problem.device)
        return torch.empty(0, len(walk.parts.dense), **problem.like), none, none.clone(), none.long()
    columns = [torch.cat(column) for column in zip(*found, strict=True)]
    return columns[0], columns[1].double(), columns[2].double(), columns[3].long()


def gradients(
    problem: Problem, backend: ModuleType, ids: Tensor, upstream: tuple[Tensor, Tensor], wanted: list[bool]
) -> list[Tensor | None]:
    """Gradients of the student's tensors for upstream gradients of the divergences and of log s.

    Args:
        problem: the work.
        backend: module of row functions.
        ids: `[n, K]` as `values` returned them.
        upstream: `[n, D]` and `[n, K]`.
        wanted: for each of the student's tensors, whether its gradient is needed.
    """
    walk = Walk.of(problem, backend)
    found = Gradients.of(problem, wanted)
    sizes = _widths(problem, walk.parts)
    unit = safe_unit(torch.cat(upstream, 1), walk.student.operand_dtype)
    for span in walk.spans:
        chunk = Chunk(walk, span)
        parts = ids[span].split(sizes, 1)
        gathered = [chunk.gather(g, i) for g, i in zip(walk.parts.gathers, parts, strict=True)]
        slopes = list(upstream[1][span].split(sizes, 1))
        weights = upstream[0][span]
        _, dz = _gradient_(chunk, weights, Values(weights, gathered), slopes, unit)
        found.add_(walk.student, dz, span)
        chunk.buffers.give(dz)
        chunk.close()
    found.scale_(unit)
    return found.as_list(len(wanted))


def _values(chunk: Chunk, only_constant: bool) -> Values:
    """Every divergence (of the constant ones alone, others 0) and every gather of a chunk."""
    columns = [
        chunk.loss(dense) if dense.constant or not only_constant else chunk.z_s.new_zeros(chunk.count)
        for dense in chunk.walk.parts.dense
    ]
    dense = torch.stack(columns, 1) if columns else chunk.z_s.new_zeros(chunk.count, 0)
    return Values(dense, [chunk.gather(gather) for gather in chunk.walk.parts.gathers])


def _gradient_(
    chunk: Chunk, weights: Tensor, values: Values, slopes: list[Tensor], unit: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`[C, D]` divergences and the sum of all gradients `[C, V]`, in the dtype in which it is multiplied.

    Gradients are divided by the `unit`, if there is one.
    """
    walk = chunk.walk
    # Rounded once, after the sum: of two large terms that nearly cancel little would be left otherwise.
    form = GradientForm(walk.problem.dtype, walk.student.cap)
    slope = walk.student.slope if unit is None else walk.student.slope / unit
    columns, dz = list(values.dense.unbind(1)), None
    dense = [(i, d) for i, d in enumerate(walk.parts.dense) if not d.constant]
    for position, (i, part) in enumerate(dense):
        later = [d for _, d in dense[position + 1 :] if d.objective is not None]
        last = all(d.teacher != part.teacher for d in later)
        weight = weights[:, i].to(walk.problem.dtype) * slope
        columns[i], term = chunk.gradient_(part, weight, form, last)
        # 0 * NaN: what a teacher is where its term does not count does no harm to the others.
        term.masked_fill_((weight == 0)[:, None], 0.0)
        dz = _added(dz, term, chunk.buffers)
    for gathered, e in zip(values.gathered, slopes, strict=True):
        dz = _added(dz, chunk.entry_gradient_(gathered, e * slope, form), chunk.buffers)
    if dz is None:
        dz = chunk.buffers.take(chunk.count).zero_()
    losses = torch.stack(columns, 1) if columns else values.dense
    return losses, _in_operands(dz, walk.student.operand_dtype, chunk.buffers)


def _added(dz: Tensor | None, term: Tensor, buffers: Buffers) -> Tensor:
    if dz is None:
        return term
    dz += term
    buffers.give(term)
    return dz


def _in_operands(dz: Tensor, dtype: torch.dtype, buffers: Buffers) -> Tensor:
    """The gradient in the operands' dtype, in a buffer's memory."""
    if dz.dtype == dtype:
        return dz
    narrow = GradientForm(dtype, None).over(buffers.take(dz.shape[0]))
    narrow.copy_(dz)
    buffers.give(dz)
    return narrow


def _widths(problem: Problem, parts: Parts) -> list[int]:
    given = 0 if problem.support_ids is None else problem.support_ids.shape[1]
    return widths(parts, problem.vocab, given)

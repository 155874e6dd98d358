"""Design A: the logits of a chunk of rows are stored, used and overwritten; four GEMMs for every divergence.

The gradient is formed in the forward pass, so that nothing of size [N, V] has to survive until backward.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opsd_kernels.engine import plan, supports
from opsd_kernels.engine.gradients import Gradients, safe_unit
from opsd_kernels.engine.problem import Problem
from opsd_kernels.engine.projection import Projection
from opsd_kernels.engine.rows import GradientForm, share_removed
from opsd_kernels.engine.teachers import prepare, several
from opsd_kernels.objectives import Objective, Support
from opsd_kernels.sources import TopK

# What cannot be known of a teacher that is known at a few entries.
OF_WHOLE_TEACHER = (
    "forward_kl", "reverse_kl", "jsd", "teacher_entropy", "teacher_logprob", "top1_agreement",
)  # fmt: skip


@dataclass(frozen=True)
class Chunks:
    """The walk over the live rows, and the backend's store that it fills with the logits of each chunk."""

    student: Projection
    spans: list[slice]
    store: Any

    @classmethod
    def of(cls, problem: Problem, backend: ModuleType, trainable_head: bool = False) -> "Chunks":
        """Plans the chunks of a problem and allocates the buffers."""
        student, teacher = prepare(problem)
        rows = plan.chunk_rows(problem, backend.LogitsStore.entry_bytes(problem), trainable_head)
        store = backend.LogitsStore.of(problem, student, teacher, rows)
        return cls(student, plan.spans(problem.live_rows, rows), store)


class Results(NamedTuple):
    """What a walk with gradients leaves."""

    loss: Tensor
    """Weighted sum of the token losses, a scalar in `problem.dtype`."""
    gradients: list[Tensor | None]
    """Of each of the student's tensors, in `problem.dtype` and the tensor's shape; None if not wanted."""
    stats: dict[str, Tensor]
    """Token statistics of the live rows by field, each `[n]`; none if they were not asked for."""


def loss_and_gradients(
    problem: Problem, backend: ModuleType, wanted: list[bool], with_stats: bool = False
) -> Results:
    """Weighted sum of the token losses and its gradients by the student's tensors.

    Args:
        problem: the work.
        backend: module of row functions.
        wanted: for each of the student's tensors, whether its gradient is needed.
        with_stats: whether to return the token statistics, at two more readings of the logits.
    """
    gradients = Gradients.of(problem, wanted)
    chunks = Chunks.of(problem, backend, trainable_head=gradients.weight is not None)
    form = GradientForm(chunks.student.operand_dtype, chunks.student.cap)
    unit = safe_unit(problem.weight, form.dtype)
    loss = torch.zeros((), **problem.like)
    parts: list[dict[str, Tensor]] = []
    for span in chunks.spans:
        z_s, z_t = chunks.store.fill_(span)
        stats = None
        if with_stats or problem.weigher is not None:
            stats = row_stats(problem, backend, z_s, z_t, span)
        weight = problem.weight[span]
        if problem.weigher is not None and stats is not None:
            weight = problem.weigher(stats, problem.index(span)).to(problem.dtype)
        coefficient = (weight if unit is None else weight / unit) * chunks.student.slope
        losses, dz = row_gradient_(problem, backend, problem.objective, z_s, z_t, span, coefficient, form)
        loss += weighted(losses, weight).sum()  # autocast would round the operands of `@`
        eps = problem.options.grad_filter
        if eps is None:
            gradients.add_(chunks.student, dz, span)
        else:
            live = backend.live_columns(dz, coefficient.abs() * eps)
            dropped = gradients.add_filtered_(chunks.student, dz, span, live)
            stats = None if stats is None else {**stats, "dropped_share": dropped}
        parts += [] if stats is None else [stats]
    gradients.scale_(unit)
    return Results(loss, gradients.as_list(len(wanted)), joined(parts) if with_stats else {})


def loss_only(problem: Problem, backend: ModuleType, with_stats: bool = False) -> Results:
    """Weighted sum of the token losses with two GEMMs, when no gradient is needed."""
    chunks = Chunks.of(problem, backend)
    loss = torch.zeros((), **problem.like)
    parts: list[dict[str, Tensor]] = []
    for span in chunks.spans:
        z_s, z_t = chunks.store.fill_(span)
        weight = problem.weight[span]
        if with_stats or problem.weigher is not None:
            parts.append(row_stats(problem, backend, z_s, z_t, span))
        if problem.weigher is not None:
            weight = problem.weigher(parts[-1], problem.index(span)).to(problem.dtype)
        loss += weighted(row_loss(problem, backend, problem.objective, z_s, z_t, span), weight).sum()
    return Results(loss, [], joined(parts) if with_stats else {})


def token_stats(problem: Problem, backend: ModuleType) -> dict[str, Tensor]:
    """Statistics of the live rows by field, each `[n]`."""
    chunks = Chunks.of(problem, backend)
    parts = []
    for span in chunks.spans:
        z_s, z_t = chunks.store.fill_(span)
        parts.append(row_stats(problem, backend, z_s, z_t, span))
    return joined(parts)


def weighted(losses: Tensor, weight: Tensor) -> Tensor:
    """losses * weight, and 0 where the weight is: an infinite loss that does not count is no NaN."""
    return torch.where(weight == 0, 0.0, losses * weight)


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Values of the chunks one after another, by name; no names for no chunks."""
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def row_gradient_(
    problem: Problem, backend: ModuleType, objective: Objective, z_s: Tensor, z_t: Tensor, span: slice,
    coefficient: Tensor, form: GradientForm,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Token losses `[C]` and coefficient * dL/dz in place of the logits, over the objective's support."""
    if objective.support is None:
        bound_ratio_(z_s, z_t, objective.ratio_bound, backend)
        losses, dz = backend.row_gradient_(z_s, z_t, objective.of_rows, coefficient, form)
    else:
        given = given_entries(problem, objective.support, span)
        losses, dz = supports.row_gradient_(z_s, z_t, objective, given, coefficient, form, backend)
    return losses, dz


def row_loss(
    problem: Problem, backend: ModuleType, objective: Objective, z_s: Tensor, z_t: Tensor, span: slice
) -> Tensor:
    """Token losses `[C]`; the logits are left as they are."""
    if objective.support is None:
        if objective.ratio_bound is not None:
            z_t = z_t.clone()
            bound_ratio_(z_s, z_t, objective.ratio_bound, backend)
        losses: Tensor = backend.row_loss(z_s, z_t, objective.of_rows).loss
        return losses
    given = given_entries(problem, objective.support, span)
    selection = supports.Selection.of(z_s, z_t, objective.support, given, backend)
    selection.restore_(z_s, z_t)
    return supports.row_loss(selection, objective).loss


def row_stats(
    problem: Problem, backend: ModuleType, z_s: Tensor, z_t: Tensor, span: slice
) -> dict[str, Tensor]:
    """Values `[C]` of every field of `TokenStats`; the logits are left as they are."""
    if problem.token_ids is None:
        ids = torch.zeros(span.stop - span.start, dtype=torch.int64, device=problem.device)
    else:
        ids = problem.token_ids[span]
    stats: dict[str, Tensor] = backend.row_stats(z_s, z_t, problem.objective.of_rows, ids)
    if problem.token_ids is None:
        absent = torch.full_like(stats["forward_kl"], torch.nan)
        stats |= {"student_logprob": absent, "teacher_logprob": absent}
    if problem.objective.support is not None:
        given = given_entries(problem, problem.objective.support, span)
        selection = supports.Selection.of(z_s, z_t, problem.objective.support, given, backend)
        selection.restore_(z_s, z_t)
        stats["clipped_fraction"] = supports.row_loss(selection, problem.objective).clipped
    elif problem.objective.ratio_bound is not None:
        loss = row_loss(problem, backend, problem.objective, z_s, z_t, span)
        stats["clipped_fraction"] = share_removed(stats["forward_kl"], loss)
    first = several(problem.teacher)[:1]
    if first and isinstance(first[0], TopK):
        stats |= {name: torch.full_like(stats[name], torch.nan) for name in OF_WHOLE_TEACHER}
    return stats | {"dropped_share": torch.zeros_like(stats["forward_kl"])}


def bound_ratio_(z_s: Tensor, z_t: Tensor, bound: float | None, backend: ModuleType) -> None:
    """Bounds log t - log s of every entry in the teacher's logits `[C, V]`, up to a constant of each row."""
    if bound is None:
        return
    top_s, sum_s, top_t, sum_t = backend.normalisers(z_s, z_t)
    shift = (top_t - top_s) + (sum_t.log() - sum_s.log()).to(z_t.dtype)
    z_t -= z_s
    z_t -= shift[:, None]
    # A column that the student excludes has no ratio and stays excluded.
    z_t.masked_fill_(z_s == -torch.inf, 0.0).clamp_(-bound, bound)
    z_t += z_s


def given_entries(problem: Problem, support: Support, span: slice) -> Tensor | None:
    """`[C, K]` entries of a support that is given; of a teacher known at a few entries alone, these."""
    if support.of == "given":
        return None if problem.support_ids is None else problem.support_ids[span]
    if support.of != "teacher" or not isinstance(problem.teacher, TopK):
        return None
    return problem.teacher.ids[problem.index(span)]

"""Losses over K entries of the vocabulary: the rest enters as one number a row, its exact mass.

The entries are taken out of the two rows of logits, which leaves the rest to be normalised by the backend;
the loss and the weights a of the K entries are arithmetic on `[C, K]` tensors, the same on every device; then
one pass writes the gradient of the rest, which is a multiple of the student's probabilities.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from opsd_kernels.engine.entries import LOG_ZERO, Entries
from opsd_kernels.engine.rows import GradientForm, clip_tokens, clipped_fraction, divergence
from opsd_kernels.objectives import Objective, Support

# How either side takes its rest, where they differ.
_RESTS_OF_SIDES = {"renormalise_teacher": ("drop", "renormalise")}


@dataclass
class Side:
    """A distribution on K entries and perhaps their rest; `p` and `log_p` are `[C, K]` or `[C, K + 1]`."""

    p: Tensor
    log_p: Tensor

    @classmethod
    def of(cls, inside: Tensor, top: Tensor, log_sum: Tensor, rest: str) -> tuple["Side", Tensor]:
        """From the entries' logits and the rest's maximum and log sum exp(z - maximum); also the rest's mass.

        The maximum is taken off first, and all of it is in fp64: an unlikely entry's log p is a difference of
        numbers far larger than the log-ratio that the gradient consists of, and K numbers a row cost little.
        """
        dtype = inside.dtype
        anchor = torch.maximum(inside.amax(1), top)
        anchor = torch.where(anchor == -torch.inf, 0.0, anchor)
        inside, outside = inside.double() - anchor[:, None], top.double() - anchor + log_sum
        whole = torch.logaddexp(inside.logsumexp(1), outside)
        mass = torch.exp(outside - whole).to(dtype)
        if rest == "renormalise":
            whole = inside.logsumexp(1)
            whole = torch.where(whole == -torch.inf, 0.0, whole)  # a support without entries has no loss
        elif rest == "tail":
            inside = torch.cat((inside, outside[:, None]), 1)
        log_p = (inside - whole[:, None]).clamp(min=LOG_ZERO)
        return cls(log_p.exp().to(dtype), log_p.to(dtype)), mass


@dataclass(frozen=True)
class Selection:
    """The entries of some rows, their logits, and what the rest sums to.

    Args:
        ids: `[C, K]` columns, 0 where there is none.
        valid: `[C, K]` whether there is one.
        z_s: `[C, K]` student logits of the entries.
        z_t: `[C, K]` teacher logits of the entries.
        rest: `[C]` the student's mass on the other columns.
        top: `[C]` largest student logit among the other columns.
        log_sum: `[C]` log of the sum of exp(z_s - top) over them.
        student: the student's distribution as the loss sees it.
        teacher: the teacher's.
    """

    ids: Tensor
    valid: Tensor
    z_s: Tensor
    z_t: Tensor
    rest: Tensor
    top: Tensor
    log_sum: Tensor
    student: Side
    teacher: Side

    @classmethod
    def of(
        cls, z_s: Tensor, z_t: Tensor, support: Support, given: Tensor | None, backend: ModuleType
    ) -> "Selection":
        """Takes the entries out of both rows of logits: they are -inf until `restore_`."""
        ids, valid = chosen(z_s, z_t, support, given)
        inside_s, inside_t = (z.gather(1, ids).masked_fill_(~valid, -torch.inf) for z in (z_s, z_t))
        for z in (z_s, z_t):
            write_(z, ids, valid, torch.full_like(ids, -torch.inf, dtype=z.dtype))
        top_s, sum_s, top_t, sum_t = backend.normalisers(z_s, z_t)
        log_s, log_t = (x.log().to(z_s.dtype) for x in (sum_s, sum_t))
        of_student, of_teacher = _RESTS_OF_SIDES.get(support.rest, (support.rest, support.rest))
        student, rest = Side.of(inside_s, top_s, log_s, of_student)
        teacher, _ = Side.of(inside_t, top_t, log_t, of_teacher)
        return cls(ids, valid, inside_s, inside_t, rest, top_s, log_s, student, teacher)

    def restore_(self, z_s: Tensor, z_t: Tensor | None = None) -> None:
        """Puts the entries' logits back into the student's row, and into the teacher's if it is given."""
        write_(z_s, self.ids, self.valid, self.z_s)
        if z_t is not None:
            write_(z_t, self.ids, self.valid, self.z_t)


@dataclass(frozen=True)
class Outcome:
    """Loss `[C]` and, for the gradient, the entries' weights `[C, K]` or `[C, K + 1]`."""

    loss: Tensor
    weight: Tensor
    scale: Tensor
    clipped: Tensor


def row_loss(selection: Selection, objective: Objective) -> Outcome:
    """The token losses of a selection; fields as in `RowStatistics`."""
    support = objective.support
    assert support is not None
    entries = Entries(selection.student, selection.teacher, objective)
    # Over whole distributions the forms that keep their digits sum to the divergence; a part of one has only
    # the signed terms.
    value = entries.value
    if not support.is_whole:
        value = entries.signed_term
        value = value if objective.entry_clip is None else value.clamp(max=objective.entry_clip)
    divergences = divergence(value.sum(1), objective)
    loss, scale = clip_tokens(divergences, objective)
    positive = entries.signed_term.clamp(min=0)
    kept = positive if objective.entry_clip is None else positive.clamp(max=objective.entry_clip)
    clipped = clipped_fraction(positive.sum(1), kept.sum(1), divergences, objective)
    return Outcome(loss, entries.weight, scale, clipped)


def row_gradient_(
    z_s: Tensor,
    z_t: Tensor,
    objective: Objective,
    given: Tensor | None,
    coefficient: Tensor,
    form: GradientForm,
    backend: ModuleType,
) -> tuple[Tensor, Tensor]:
    """As a backend's `row_gradient_`, over the objective's support: the teacher's logits are used up, the
    student's are as they were."""
    support = objective.support
    assert support is not None
    selection = Selection.of(z_s, z_t, support, given, backend)
    outcome = row_loss(selection, objective)
    scale = outcome.scale * coefficient
    weight, student = outcome.weight, selection.student.p
    count = selection.ids.shape[1]
    total = weight.sum(1)
    inside = (weight - student * total[:, None])[:, :count]
    # The rest of the row shares one gradient in proportion to its probabilities: the tail's weight, and the
    # normaliser's part.
    if support.rest == "tail":
        rest = weight[:, count] - student[:, count] * total
    elif support.rest == "renormalise":
        rest = torch.zeros_like(total)
    else:
        rest = -selection.rest * total
    dz = backend.softmax_gradient_(z_s, z_t, selection.top, selection.log_sum, rest * scale, form)
    slope = 1.0 if form.cap is None else 1 - (selection.z_s / form.cap).square()
    inside = torch.where(selection.valid, inside * slope * scale[:, None], 0.0)
    write_(dz, selection.ids, selection.valid, inside.to(dz.dtype))
    selection.restore_(z_s)
    return outcome.loss, dz


def chosen(z_s: Tensor, z_t: Tensor, support: Support, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Columns `[C, K]` of the support, and which of them are entries: no column twice, none excluded by the
    side whose most likely ones they are. The teacher's are among those `given`, if it knows no others."""
    if support.of == "given":
        assert given is not None
        ids = given
    elif support.of == "student":
        ids = _most_likely(z_s, support)
    elif support.of == "teacher":
        ids = _most_likely(z_t, support, given)
    else:
        student, teacher = _most_likely(z_s, support), _most_likely(z_t, support)
        shared = (student[:, :, None] == teacher[:, None, :]).any(2)
        union = torch.cat((student, teacher), 1)
        ids = union if support.of == "union" else student.masked_fill(~shared, -1)
    ids, _ = ids.sort(1)
    valid = ids >= 0
    valid[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    return ids.clamp(min=0), valid


def _most_likely(z: Tensor, support: Support, among: Tensor | None = None) -> Tensor:
    """Ids `[C, k]` of the largest logits, of all or `among` some `[C, K]`; -1 for one that is excluded."""
    assert support.k is not None
    if among is not None:
        z = z.gather(1, among.clamp(min=0)).masked_fill(among < 0, -torch.inf)
    best = z.topk(min(support.k, z.shape[1]), dim=1)
    ids = best.indices if among is None else among.gather(1, best.indices)
    return ids.masked_fill(best.values == -torch.inf, -1)


def write_(z: Tensor, ids: Tensor, valid: Tensor, values: Tensor) -> None:
    """z[r, ids[r, k]] = values[r, k] for the valid k. The others write what is there, or the same again.

    Each row's ids that are none are pointed at a valid one of the row with its value, so that no two writes
    to a place differ; a row without any writes back what column 0 holds.
    """
    anchor = valid.to(torch.int8).argmax(1, keepdim=True)
    some = valid.any(1, keepdim=True)
    anchor_id = ids.gather(1, anchor)
    anchor_value = torch.where(some, values.gather(1, anchor), z.gather(1, anchor_id))
    ids = torch.where(valid, ids, anchor_id)
    z.scatter_(1, ids, torch.where(valid, values, anchor_value))

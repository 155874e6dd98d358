"""The row functions that the engine calls; see the package's docstring."""

from collections.abc import Iterator

import torch
from torch import Tensor

from opsd_kernels.engine.entries import LOG_ZERO, Entries, Softmax
from opsd_kernels.engine.rows import (
    GradientForm,
    RowStatistics,
    clip_tokens,
    clipped_fraction,
    divergence,
)
from opsd_kernels.objectives import Objective

BLOCK_BYTES = {"cpu": 3 << 19}
DEFAULT_BLOCK_BYTES = 64 << 20


def row_loss(z_s: Tensor, z_t: Tensor, objective: Objective) -> RowStatistics:
    """Statistics of the rows of `z_s` and `z_t` `[C, V]`, which are left as they are."""
    parts = []
    for rows in blocks(z_s):
        student, teacher = Softmax(z_s[rows]), Softmax(z_t[rows])
        entries = Entries(student, teacher, objective)
        loss, scale = _token_loss(entries)
        sums = student.top, student.total, teacher.top, teacher.total
        parts.append(RowStatistics(loss, *sums, entries.weight.sum(-1), scale))
    return RowStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def row_gradient_(
    z_s: Tensor, z_t: Tensor, objective: Objective, coefficient: Tensor, form: GradientForm
) -> tuple[Tensor, Tensor]:
    """Losses of the rows, and their gradient in place of the teacher's logits.

    Args:
        z_s: `[C, V]` student logits, left as they are.
        z_t: `[C, V]` teacher logits, used up.
        objective: the token loss.
        coefficient: `[C]` factor of each row's gradient.
        form: how the gradient is wanted.

    Returns:
        `[C]` losses, without the coefficient, and `[C, V]` `coefficient * dL/dz_s` in the memory of `z_t`.
    """
    losses, dz = [], form.over(z_t)
    for rows in blocks(z_s):
        entries = Entries(Softmax(z_s[rows]), Softmax(z_t[rows]), objective)
        loss, scale = _token_loss(entries)
        losses.append(loss)
        gradient = _gradient(entries, entries.weight.sum(-1))
        write_(dz[rows], gradient, scale * coefficient[rows], z_s[rows], form)
    return torch.cat(losses), dz


def slab_gradient_(
    z_s: Tensor,
    z_t: Tensor,
    objective: Objective,
    statistics: RowStatistics,
    coefficient: Tensor,
    form: GradientForm,
) -> Tensor:
    """As `row_gradient_` for some columns of the rows: `[n, slab]` logits, `[n]` statistics of whole rows."""
    dz = form.over(z_t)
    for rows in blocks(z_s):
        student = Softmax(z_s[rows], statistics.top_s[rows], statistics.sum_s[rows])
        teacher = Softmax(z_t[rows], statistics.top_t[rows], statistics.sum_t[rows])
        gradient = _gradient(Entries(student, teacher, objective), statistics.total[rows])
        write_(dz[rows], gradient, statistics.scale[rows] * coefficient[rows], z_s[rows], form)
    return dz


def normalisers(z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`[C]` student's maximum and sum exp(z - maximum), teacher's likewise; -inf and 0 for an empty row."""
    found: list[Tensor] = []
    for z in (z_s, z_t):
        tops, sums = [], []
        for rows in blocks(z):
            top = z[rows].amax(-1)
            anchor = torch.where(top == -torch.inf, 0.0, top)
            tops.append(top)
            sums.append((z[rows] - anchor[:, None]).exp_().sum(-1, dtype=torch.float64))
        found += [torch.cat(tops), torch.cat(sums)]
    top_s, sum_s, top_t, sum_t = found
    return top_s, sum_s, top_t, sum_t


def softmax_gradient_(
    z_s: Tensor, z_t: Tensor, top: Tensor, log_sum: Tensor, coefficient: Tensor, form: GradientForm
) -> Tensor:
    """`[C, V]` coefficient * exp(z_s - top - log_sum), in the memory of `z_t`; 0 where z_s is -inf.

    Args:
        z_s: `[C, V]` student logits.
        z_t: `[C, V]` memory for the result.
        top: `[C]` maximum of z_s, or -inf for a row that is excluded as a whole.
        log_sum: `[C]` log of the sum of exp(z_s - top).
        coefficient: `[C]`.
        form: how the gradient is wanted.
    """
    dz = form.over(z_t)
    top, log_sum = (torch.where(top == -torch.inf, 0.0, x) for x in (top, log_sum))
    for rows in blocks(z_s):
        p = (z_s[rows] - top[rows, None]).sub_(log_sum[rows, None]).exp_()
        write_(dz[rows], p, coefficient[rows], z_s[rows], form)
    return dz


def live_columns(dz: Tensor, bound: Tensor) -> Tensor:
    """`[V]` bool: columns of `dz` `[C, V]` in which some row's |dz| is not at most its `bound` `[C]`."""
    live = torch.zeros(dz.shape[1], dtype=torch.bool, device=dz.device)
    for rows in blocks(dz):
        live |= ~(dz[rows].abs() <= bound[rows, None]).all(0)
    return live


def row_stats(z_s: Tensor, z_t: Tensor, objective: Objective, token_ids: Tensor) -> dict[str, Tensor]:
    """`[C]` values of the fields of `TokenStats`; `token_ids` is `[C]`."""
    parts = []
    for rows in blocks(z_s):
        student, teacher = Softmax(z_s[rows]), Softmax(z_t[rows])
        divergences = ("forward_kl", "reverse_kl", "jsd")
        part = {name: _token_loss(Entries(student, teacher, Objective(name)))[0] for name in divergences}
        ids = token_ids[rows, None]
        part["student_entropy"] = _entropy(student)
        part["teacher_entropy"] = _entropy(teacher)
        part["student_logprob"] = _log_prob_of(ids, student.log_p)
        part["teacher_logprob"] = _log_prob_of(ids, teacher.log_p)
        part["top1_agreement"] = (student.p.argmax(-1) == teacher.p.argmax(-1)).to(student.p.dtype)
        part["clipped_fraction"] = _clipped_fraction(Entries(student, teacher, objective))
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def blocks(z: Tensor) -> Iterator[slice]:
    """Slices of the rows of `z` `[C, V]` whose temporaries fit the cache; V may be 0, of a shard."""
    row_bytes = max(z.shape[1], 1) * max(z.element_size(), 4)
    rows = max(1, BLOCK_BYTES.get(z.device.type, DEFAULT_BLOCK_BYTES) // row_bytes)
    # No rows at all are one empty block, so that there is something to concatenate.
    for start in range(0, max(z.shape[0], 1), rows):
        yield slice(start, min(start + rows, z.shape[0]))


def _gradient(entries: Entries, total: Tensor) -> Tensor:
    """a - s sum a, the one backward form of every divergence."""
    return torch.addcmul(entries.weight, entries.s, total[:, None], value=-1)


def write_(out: Tensor, gradient: Tensor, scale: Tensor, z_s: Tensor, form: GradientForm) -> None:
    """scale * gradient through the soft-cap's slope, rounded to the wanted dtype."""
    if form.cap is not None:
        gradient.addcmul_(gradient, (z_s / form.cap).square_(), value=-1)
    torch.mul(gradient, scale[:, None], out=out)


def _token_loss(entries: Entries) -> tuple[Tensor, Tensor]:
    """The token's loss with its clips, and the factor of its gradient by `token_clip`."""
    return clip_tokens(divergence(entries.value.sum(-1), entries.objective), entries.objective)


def _log_prob_of(ids: Tensor, log_p: Tensor) -> Tensor:
    chosen = log_p.gather(-1, ids)[:, 0]
    return torch.where(chosen <= LOG_ZERO, -torch.inf, chosen)


def _entropy(softmax: Softmax) -> Tensor:
    return -(softmax.p * softmax.log_p).sum(-1)


def _clipped_fraction(entries: Entries) -> Tensor:
    objective = entries.objective
    positive = entries.signed_term.clamp(min=0)
    kept = positive if objective.entry_clip is None else positive.clamp(max=objective.entry_clip)
    loss = divergence(entries.value.sum(-1), objective)
    return clipped_fraction(positive.sum(-1), kept.sum(-1), loss, objective)

"""The four row functions that the engine calls; see the package's docstring."""

from collections.abc import Iterator

import torch

from opsd_kernels.backends.torch.terms import LOG_ZERO, Entries, Softmax
from opsd_kernels.engine.rows import RowStatistics, clip_tokens, clipped_fraction, divergence
from opsd_kernels.objectives import Objective

BLOCK_BYTES = {"cpu": 3 << 19}
DEFAULT_BLOCK_BYTES = 64 << 20


def row_loss(z_s: torch.Tensor, z_t: torch.Tensor, objective: Objective) -> RowStatistics:
    """Statistics of the rows of `z_s` and `z_t` `[C, V]`, which are left as they are."""
    parts = []
    for rows in _blocks(z_s):
        student, teacher = Softmax(z_s[rows]), Softmax(z_t[rows])
        entries = Entries(student, teacher, objective)
        loss, scale = _token_loss(entries)
        sums = student.top, student.total, teacher.top, teacher.total
        parts.append(RowStatistics(loss, *sums, entries.weight.sum(-1), scale))
    return RowStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def row_gradient_(
    z_s: torch.Tensor, z_t: torch.Tensor, objective: Objective, coefficient: torch.Tensor
) -> torch.Tensor:
    """Losses of the rows, and their gradient in place of the teacher's logits.

    Args:
        z_s: `[C, V]` student logits, left as they are (a soft-cap's derivative needs them).
        z_t: `[C, V]` teacher logits; on return `coefficient * dL/dz_s`.
        objective: the token loss.
        coefficient: `[C]` factor of each row's gradient.

    Returns:
        `[C]` losses, without the coefficient.
    """
    losses = []
    for rows in _blocks(z_s):
        entries = Entries(Softmax(z_s[rows]), Softmax(z_t[rows]), objective)
        loss, scale = _token_loss(entries)
        losses.append(loss)
        _write_gradient(z_t[rows], entries, entries.weight.sum(-1), scale * coefficient[rows])
    return torch.cat(losses)


def slab_gradient_(
    z_s: torch.Tensor,
    z_t: torch.Tensor,
    objective: Objective,
    statistics: RowStatistics,
    coefficient: torch.Tensor,
) -> None:
    """As `row_gradient_` for some columns of the rows: `[n, slab]` logits, `[n]` statistics of whole rows."""
    for rows in _blocks(z_s):
        student = Softmax(z_s[rows], statistics.top_s[rows], statistics.sum_s[rows])
        teacher = Softmax(z_t[rows], statistics.top_t[rows], statistics.sum_t[rows])
        entries = Entries(student, teacher, objective)
        scale = statistics.scale[rows] * coefficient[rows]
        _write_gradient(z_t[rows], entries, statistics.total[rows], scale)


def row_stats(
    z_s: torch.Tensor, z_t: torch.Tensor, objective: Objective, token_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`[C]` values of every field of `TokenStats`; `token_ids` is `[C]`."""
    parts = []
    for rows in _blocks(z_s):
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


def _blocks(z: torch.Tensor) -> Iterator[slice]:
    row_bytes = z.shape[1] * z.element_size()
    rows = max(1, BLOCK_BYTES.get(z.device.type, DEFAULT_BLOCK_BYTES) // row_bytes)
    # No rows at all are one empty block, so that there is something to concatenate.
    for start in range(0, max(z.shape[0], 1), rows):
        yield slice(start, min(start + rows, z.shape[0]))


def _write_gradient(out: torch.Tensor, entries: Entries, total: torch.Tensor, scale: torch.Tensor) -> None:
    """scale (a - s sum a), the one backward form of every divergence."""
    gradient = torch.addcmul(entries.weight, entries.s, total[:, None], value=-1)
    torch.mul(gradient, scale[:, None], out=out)


def _token_loss(entries: Entries) -> tuple[torch.Tensor, torch.Tensor]:
    """The token's loss with its clips, and the factor of its gradient by `token_clip`."""
    return clip_tokens(divergence(entries.value.sum(-1), entries.objective), entries.objective)


def _log_prob_of(ids: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    chosen = log_p.gather(-1, ids)[:, 0]
    return torch.where(chosen <= LOG_ZERO, -torch.inf, chosen)


def _entropy(softmax: Softmax) -> torch.Tensor:
    return -(softmax.p * softmax.log_p).sum(-1)


def _clipped_fraction(entries: Entries) -> torch.Tensor:
    objective = entries.objective
    positive = entries.signed_term.clamp(min=0)
    kept = positive if objective.entry_clip is None else positive.clamp(max=objective.entry_clip)
    loss = divergence(entries.value.sum(-1), objective)
    return clipped_fraction(positive.sum(-1), kept.sum(-1), loss, objective)

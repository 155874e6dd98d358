"""The four row functions that the engine calls; see the package's docstring."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from opsd_kernels.backends.torch.terms import Entries
from opsd_kernels.objectives import Objective

BLOCK_BYTES = {"cpu": 2 << 20}
DEFAULT_BLOCK_BYTES = 64 << 20


class RowStatistics(NamedTuple):
    """What a row needs once its logits are gone, each `[C]`."""

    loss: torch.Tensor
    """Loss of the token, clips applied."""
    lse_s: torch.Tensor
    """log sum exp of the student's logits."""
    lse_t: torch.Tensor
    """log sum exp of the teacher's logits."""
    total: torch.Tensor
    """sum_v a_v."""
    scale: torch.Tensor
    """Factor of the gradient by `token_clip`, 1 where the token is not clipped."""


def row_loss(z_s: torch.Tensor, z_t: torch.Tensor, objective: Objective) -> RowStatistics:
    """Statistics of the rows of `z_s` and `z_t` `[C, V]`, which are left as they are."""
    parts = []
    for rows in _blocks(z_s):
        ls, lt = z_s[rows].log_softmax(-1), z_t[rows].log_softmax(-1)
        entries = Entries(ls, lt, objective)
        loss, scale = _token_clip(entries.value.sum(-1), objective)
        lse_s, lse_t = z_s[rows].logsumexp(-1), z_t[rows].logsumexp(-1)
        parts.append(RowStatistics(loss, lse_s, lse_t, entries.weight.sum(-1), scale))
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
        entries = Entries(z_s[rows].log_softmax(-1), z_t[rows].log_softmax(-1), objective)
        loss, scale = _token_clip(entries.value.sum(-1), objective)
        losses.append(loss)
        total = entries.weight.sum(-1)
        _write_gradient(z_t[rows], entries, total, scale * coefficient[rows])
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
        ls = z_s[rows] - statistics.lse_s[rows, None]
        lt = z_t[rows] - statistics.lse_t[rows, None]
        entries = Entries(ls, lt, objective)
        scale = statistics.scale[rows] * coefficient[rows]
        _write_gradient(z_t[rows], entries, statistics.total[rows], scale)


def row_stats(
    z_s: torch.Tensor, z_t: torch.Tensor, objective: Objective, token_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`[C]` values of every field of `TokenStats`; `token_ids` is `[C]`."""
    parts = []
    for rows in _blocks(z_s):
        ls, lt = z_s[rows].log_softmax(-1), z_t[rows].log_softmax(-1)
        divergences = ("forward_kl", "reverse_kl", "jsd")
        part = {name: Entries(ls, lt, Objective(name)).value.sum(-1) for name in divergences}
        ids = token_ids[rows, None]
        part["student_entropy"] = _entropy(ls)
        part["teacher_entropy"] = _entropy(lt)
        part["student_logprob"] = ls.gather(-1, ids)[:, 0]
        part["teacher_logprob"] = lt.gather(-1, ids)[:, 0]
        part["top1_agreement"] = (ls.argmax(-1) == lt.argmax(-1)).to(ls.dtype)
        part["clipped_fraction"] = _clipped_fraction(Entries(ls, lt, objective))
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _blocks(z: torch.Tensor) -> Iterator[slice]:
    row_bytes = z.shape[1] * z.element_size()
    rows = max(1, BLOCK_BYTES.get(z.device.type, DEFAULT_BLOCK_BYTES) // row_bytes)
    for start in range(0, z.shape[0], rows):
        yield slice(start, min(start + rows, z.shape[0]))


def _write_gradient(out: torch.Tensor, entries: Entries, total: torch.Tensor, scale: torch.Tensor) -> None:
    """scale (a - s sum a), the one backward form of every divergence."""
    gradient = torch.addcmul(entries.weight, entries.s, total[:, None], value=-1)
    torch.mul(gradient, scale[:, None], out=out)


def _token_clip(loss: torch.Tensor, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped loss, and the factor of its gradient."""
    bound = objective.token_clip
    if bound is None:
        return loss, torch.ones_like(loss)
    kept = 0.0 if objective.clip_mode == "zero" else bound / loss
    return loss.clamp(max=bound), torch.where(loss > bound, kept, 1.0)


def _entropy(log_p: torch.Tensor) -> torch.Tensor:
    p = log_p.exp()
    return -torch.where(p == 0, 0.0, p * log_p).sum(-1)


def _clipped_fraction(entries: Entries) -> torch.Tensor:
    """1 minus what the clips leave: of the positive terms' sum, then of the token's loss."""
    objective = entries.objective
    kept = torch.ones_like(entries.s[:, 0])
    if objective.entry_clip is not None:
        positive = entries.signed_term.clamp(min=0)
        total = positive.sum(-1)
        share = positive.clamp_(max=objective.entry_clip).sum(-1) / total
        kept = torch.where(total > 0, share, 1.0)
    if objective.token_clip is not None:
        token = entries.value.sum(-1)
        kept = torch.where(token > objective.token_clip, kept * objective.token_clip / token, kept)
    return 1 - kept

"""Weights by where a token stands in its row, counted in live tokens."""

import torch
from torch import Tensor

from opsd_kernels.tokens import Batch
from opsd_kernels.weights.base import check_choice, check_share, chosen, lengths, on_live, position, weight


@weight
def position_sigmoid(
    batch: Batch, *, floor: float = 0.25, center: float = 0.30, width: float = 0.10
) -> Tensor:
    """w_i = floor + (1 - floor) sigmoid((r_i - center) / width), r_i = (i - 1/2) / L (PW-OPSD, 2605.21606).

    i is the token's 1-based place among the L live tokens of its row. Published ("moderate"): 0.25, 0.30,
    0.10; the weights are not renormalised.
    """
    place = (position(batch.mask) - 0.5) / lengths(batch.mask)
    return on_live(batch, floor + (1 - floor) * torch.sigmoid((place - center) / width))


@weight
def horizon(batch: Batch, *, tokens: int | None = None, share: float | None = None) -> Tensor:
    """1 on the first tokens of each row (POPD and TOPD, arXiv 2605.31490).

    Args:
        tokens: how many. POPD grows it with training: H0 + dH floor(k / dk); ESR (arXiv 2605.27028) has 100.
        share: the first ceil(share L) of a row's L tokens. TOPD: 0.1.
    """
    if (tokens is None) == (share is None):
        raise ValueError(f"tokens, share: expected exactly one of them; got {tokens!r} and {share!r}")
    if tokens is not None:
        return chosen(batch, position(batch.mask) <= tokens)
    assert share is not None
    check_share("share", share)
    # The product is rounded: 0.07 * 100 is a little more than 7.
    return chosen(batch, position(batch.mask) < share * lengths(batch.mask).double() + 1 - 1e-9)


@weight
def skip_first(batch: Batch, *, tokens: int = 3) -> Tensor:
    """0 on the first tokens of each row, else 1 (CaOPD, arXiv 2604.16830: 3)."""
    return chosen(batch, position(batch.mask) > tokens)


@weight
def ramp(batch: Batch, *, length: int) -> Tensor:
    """w_i = i / length, of -log s(EOS) in arXiv 2605.11182's code: the later, the more it pays to stop.

    Args:
        length: the longest rollout.
    """
    return on_live(batch, position(batch.mask) / length)


@weight
def position_decay(batch: Batch, *, rate: float, length: int) -> Tensor:
    """w_i = exp(-rate (i - 1) / length), of the divergence in arXiv 2605.11182's code.

    Args:
        rate: fall of log w over `length` tokens.
        length: the longest rollout.
    """
    return on_live(batch, (-rate * (position(batch.mask) - 1) / length).exp())


@weight
def prefix_trust(batch: Batch, *, gain: float = 0.5) -> Tensor:
    """w_i = 1 + gain (1 - sum_{j < i} d_j / sum_j d_j), d = |log t - log s| (IW-OPD, arXiv 2606.22600: 0.5).

    The further a row's prefix has left the teacher, of all that it will, the less its next token weighs.
    """
    gap = on_live(batch, (batch.stats.teacher_logprob - batch.stats.student_logprob).abs())
    before = (gap.cumsum(1) - gap) / (gap.sum(1, keepdim=True) + 1e-8)
    return on_live(batch, 1 + gain * (1 - before).clamp(0, 1))


@weight
def length_gate(batch: Batch, *, tokens: int = 2048) -> Tensor:
    """0 on rows of more live tokens than this, else 1 (arXiv 2605.11182: 2048)."""
    return chosen(batch, batch.mask.sum(1, keepdim=True) <= tokens)


@weight
def cord(batch: Batch, *, top: int = 20, boost: float = 2.0, decay: float = 1.0) -> Tensor:
    """w_i = (boost on the row's `top` tokens of largest KL(s || t), else 1) exp(-decay (i - 1) / L).

    CORD (arXiv 2601.16547, eq. 4-7) has the top 20, a boost above 1 and a decay that favours early tokens;
    the boost's size and the exponential are this package's choice.
    """
    scores = batch.stats.reverse_kl.masked_fill(~batch.mask, -torch.inf)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    factor = torch.where(rank < top, boost, 1.0)
    place = (position(batch.mask) - 1) / lengths(batch.mask)
    return on_live(batch, factor * (-decay * place).exp())


@weight
def entropy_prefix(batch: Batch, *, limit: float = 0.1, of: str = "student") -> Tensor:
    """1 where sum_{j <= i} H_j / sum_j H_j < limit: a row's opening (TSD-KD, arXiv 2603.13260: 0.1).

    Args:
        of: whose entropy, `"student"` or `"teacher"`.
    """
    check_choice("of", of, ("student", "teacher"))
    found = batch.stats.student_entropy if of == "student" else batch.stats.teacher_entropy
    entropy = on_live(batch, found)
    return chosen(batch, entropy.cumsum(1) < limit * entropy.sum(1, keepdim=True))

"""The divisor of a term's sum over the tokens, as a constant factor of each token."""

import torch
from torch import Tensor

Denominator = float | Tensor | None
BY_SEQUENCE = ("sequences", "sequence_weights", "sequence_selected")


def divisor(
    weight: Tensor,
    mask: Tensor,
    normaliser: str,
    reduction: str,
    denominator: Denominator = None,
    exact: bool = False,
) -> Tensor | float:
    """What the loss of each token is divided by, `[B, C]`, `[B, 1]` or a number.

    Args:
        weight: `[B, C]` the term's weights.
        mask: `[B, C]` bool, the live tokens.
        normaliser: see `recipes.Term`.
        reduction: `"mean"`, `"sum"`, `"none"`, `"sequence_mean"` or `"sequences"`.
        denominator: the caller's number of tokens, or of sequences for the normalisers by sequence. For
            `"weights"` and `"selected"` the sum over these tokens counts by their share of it, so that parts
            of a batch add up to a mean, if not to that of the whole batch's weights.
        exact: whether the denominator is the `total` of a whole batch of which these tokens are a part.
    """
    if reduction in ("sum", "none"):
        return 1.0
    counted = _counted(weight, mask, normaliser)
    if normaliser in BY_SEQUENCE or reduction in ("sequence_mean", "sequences"):
        each = not_zero(counted.sum(1, keepdim=True))
        return each if reduction == "sequences" else each * _count((counted.sum(1) != 0).sum(), denominator)
    if normaliser == "tokens" or exact:
        return _count(counted.sum(), denominator)
    live = mask.sum().clamp(min=1)
    # Of a part of a larger batch: its own mean counts by its share of the tokens.
    return not_zero(counted.sum()) * (_count(live, denominator) / live)


def total(weight: Tensor, mask: Tensor, normaliser: str) -> Tensor:
    """What tokens are counted as; those of a whole batch, unless 0, are the denominator of its parts."""
    counted = _counted(weight, mask, normaliser)
    found = (counted.sum(1) != 0).sum() if normaliser in BY_SEQUENCE else counted.sum()
    return found.to(weight.dtype)


def _counted(weight: Tensor, mask: Tensor, normaliser: str) -> Tensor:
    """`[B, C]` what each token adds to the divisor."""
    if normaliser in ("weights", "sequence_weights"):
        return torch.where(mask, weight, 0.0)
    if normaliser in ("selected", "sequence_selected"):
        return (mask & (weight != 0)).to(weight.dtype)
    return mask.to(weight.dtype)


def _count(found: Tensor, denominator: Denominator) -> Tensor | float:
    if denominator is None:
        return found.clamp(min=1)
    return denominator.reshape(()).to(found.device) if isinstance(denominator, Tensor) else denominator


def not_zero(total: Tensor) -> Tensor:
    """Nothing is divided by 0 where there is nothing to divide."""
    return torch.where(total == 0, torch.ones_like(total), total)

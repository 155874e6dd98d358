"""What the backends' row functions share: the statistics of a row, and what follows once V is summed away."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opsd_kernels.objectives import Objective

# A sum beyond this is infinite: backends put a low finite number in the place of log 0.
INFINITE_LOSS = 1e10


class RowStatistics(NamedTuple):
    """What a row needs once its logits are gone, each `[C]`; the two sums may be of a wider dtype."""

    loss: Tensor
    """Loss of the token, clips applied."""
    top_s: Tensor
    """Largest student logit."""
    sum_s: Tensor
    """sum exp(z_s - top_s)."""
    top_t: Tensor
    """Largest teacher logit."""
    sum_t: Tensor
    """sum exp(z_t - top_t)."""
    total: Tensor
    """sum_v a_v, for probabilities that sum to 1."""
    scale: Tensor
    """Factor of the gradient by `token_clip`, 1 where the token is not clipped."""


@dataclass(frozen=True)
class GradientForm:
    """How the gradient of the logits is wanted.

    Args:
        dtype: fp32 (or fp64), or the 2-byte dtype in which it will be multiplied with the head.
        cap: soft-cap of z / T, through whose slope 1 - (z / T / cap)^2 the gradient goes; None: no cap.
    """

    dtype: torch.dtype
    cap: float | None = None

    def over(self, z_t: Tensor) -> Tensor:
        """The gradient's place `[C, V]`: the memory of the teacher's logits, each row at its row's start.

        A 2-byte gradient takes the first half of a row. It is written only after the logits below have been
        read, so no buffer is needed beyond the two of the logits.
        """
        if z_t.dtype == self.dtype:
            return z_t
        return z_t.view(self.dtype)[:, : z_t.shape[1]]


def divergence(value_sum: Tensor, objective: Objective) -> Tensor:
    """`[C]` divergences before `token_clip`, from the sums over the vocabulary."""
    loss = torch.where(value_sum > INFINITE_LOSS, torch.inf, value_sum)
    signed = objective.entry_clip is not None
    if objective.support is not None:
        signed = signed or not objective.support.is_whole
    # Without a clip the divergence of two distributions is below 0 by rounding only.
    return loss if signed else loss.clamp(min=0)


def clip_tokens(loss: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """`[C]` losses with `token_clip`, and the factor of their gradients."""
    bound = objective.token_clip
    if bound is None:
        return loss, torch.ones_like(loss)
    kept = 0.0 if objective.clip_mode == "zero" else bound / loss
    return loss.clamp(max=bound), torch.where(loss > bound, kept, 1.0)


def clipped_fraction(positive: Tensor, kept: Tensor, loss: Tensor, objective: Objective) -> Tensor:
    """`[C]` share of the divergence that the clips remove; see `TokenStats`.

    Args:
        positive: sum of the positive signed terms.
        kept: the same with each term at most `entry_clip`; not read without one.
        loss: the divergence before `token_clip`.
        objective: whose clips are meant.
    """
    final = clip_tokens(loss, objective)[0]
    kept = positive if objective.entry_clip is None else kept
    if objective.support is None or objective.support.is_whole:
        return share_removed(loss + (positive - kept), final)
    # The signed terms of a part of the vocabulary may sum to less than 0, which has no shares.
    return 1 - (1 - share_removed(positive, kept)) * (1 - share_removed(loss, final))


def share_removed(whole: Tensor, left: Tensor) -> Tensor:
    """1 - left / whole, and 0 where nothing is missing or nothing was there."""
    return torch.where((whole > 0) & (left != whole), 1 - left / whole, 0.0)

"""What the backends' row functions share: the statistics of a row, and what follows once V is summed away."""

from typing import NamedTuple

import torch

from opsd_kernels.objectives import Objective

# A sum beyond this is infinite: backends put a low finite number in the place of log 0.
INFINITE_LOSS = 1e10


class RowStatistics(NamedTuple):
    """What a row needs once its logits are gone, each `[C]`; the two sums may be of a wider dtype."""

    loss: torch.Tensor
    """Loss of the token, clips applied."""
    top_s: torch.Tensor
    """Largest student logit."""
    sum_s: torch.Tensor
    """sum exp(z_s - top_s)."""
    top_t: torch.Tensor
    """Largest teacher logit."""
    sum_t: torch.Tensor
    """sum exp(z_t - top_t)."""
    total: torch.Tensor
    """sum_v a_v, for probabilities that sum to 1."""
    scale: torch.Tensor
    """Factor of the gradient by `token_clip`, 1 where the token is not clipped."""


def divergence(value_sum: torch.Tensor, objective: Objective) -> torch.Tensor:
    """`[C]` divergences before `token_clip`, from the sums over the vocabulary."""
    loss = torch.where(value_sum > INFINITE_LOSS, torch.inf, value_sum)
    # Without a clip a divergence is below 0 by rounding only.
    return loss.clamp(min=0) if objective.entry_clip is None else loss


def clip_tokens(loss: torch.Tensor, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """`[C]` losses with `token_clip`, and the factor of their gradients."""
    bound = objective.token_clip
    if bound is None:
        return loss, torch.ones_like(loss)
    kept = 0.0 if objective.clip_mode == "zero" else bound / loss
    return loss.clamp(max=bound), torch.where(loss > bound, kept, 1.0)


def clipped_fraction(
    positive: torch.Tensor, kept: torch.Tensor, loss: torch.Tensor, objective: Objective
) -> torch.Tensor:
    """`[C]` 1 minus what the clips leave: of the positive terms' sum, then of the token's loss.

    Args:
        positive: sum of the positive signed terms.
        kept: the same with each term at most `entry_clip`.
        loss: the divergence before `token_clip`.
        objective: whose clips are meant.
    """
    left = torch.ones_like(positive)
    if objective.entry_clip is not None:
        left = torch.where(positive > 0, kept / positive, left)
    if objective.token_clip is not None:
        left = torch.where(loss > objective.token_clip, left * objective.token_clip / loss, left)
    return 1 - left

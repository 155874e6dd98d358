"""Data that is made of a whole batch before its loss: advantages, and other columns of `DATA`.

A preparer is a function of a `Batch` and keyword options that returns further columns of data by name.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from opsd_kernels.registry import Registry
from opsd_kernels.tokens import Batch
from opsd_kernels.weights.base import (
    batch_mean,
    check_choice,
    group_index,
    group_max,
    group_sum,
    log_old,
    on_live,
    per_teacher,
    row_mean,
    segment_mean,
)
from opsd_kernels.weights.sequences import step, teacher_share

Preparer = Callable[..., dict[str, Tensor]]

prepare: Registry[Preparer] = Registry("preparer")

LOG_LIMIT = 20.0


@prepare
def group_advantage(
    batch: Batch, *, deviation: bool = True, leave_one_out: bool = False, eps: float = 1e-4
) -> dict[str, Tensor]:
    """`advantage` of GRPO: (reward - mean) / (std + eps) over the rollouts of a group.

    The standard deviation is the unbiased one. A group of one rollout, or of equal rewards, has advantage 0.

    Args:
        deviation: False leaves out the division (Dr. GRPO).
        leave_one_out: the mean is that of the group's other rollouts (RLOO).
        eps: TRL has 1e-4, verl 1e-6.
    """
    reward = batch["reward"].to(torch.promote_types(batch["reward"].dtype, torch.float32))
    index, groups = group_index(batch)
    n = group_sum(torch.ones_like(reward), index, groups)
    # Counted from the group's largest, so that equal rewards leave no rounding to be divided by eps.
    shifted = reward - group_max(reward, torch.ones_like(reward, dtype=torch.bool), index, groups)
    advantage = shifted - group_sum(shifted, index, groups) / n
    if deviation:
        variance = group_sum(advantage.square(), index, groups) / (n - 1).clamp(min=1)
        # Where all are equal they are 0 whatever they are divided by, an eps of 0 too.
        divisor = torch.where(variance > 0, variance.sqrt() + eps, 1.0)
    else:
        divisor = torch.ones_like(reward)
    if leave_one_out:
        advantage = advantage * n / (n - 1).clamp(min=1)
    return {"advantage": on_live(batch, (advantage / divisor)[:, None])}


@prepare
def draw(batch: Batch) -> dict[str, Tensor]:
    """`draw`, uniform numbers of torch's global generator, unless the data has it: all terms see the same."""
    found = batch["draw"] if "draw" in batch.data else torch.rand(batch.mask.shape, device=batch.mask.device)
    return {"draw": on_live(batch, found)}


@prepare
def future_cross_entropy(batch: Batch, *, discount: float = 1.0) -> dict[str, Tensor]:
    """`advantage` A_t = -sum_{u > t} discount^(u - t - 1) CE_u, CE = -sum_v t_v log s_v (DistIL, 2606.05152).

    The part of d/dtheta E_{y ~ s}[sum_t CE_t] that comes from the choice of the tokens, beside the
    cross-entropies' own gradient. No discount is published.
    """
    cost = batch.stats.forward_kl + batch.stats.teacher_entropy
    later = functional.pad(_to_go(batch, cost, discount)[:, 1:], (0, 1))
    return {"advantage": on_live(batch, -later)}


@prepare
def reward_to_go(
    batch: Batch,
    *,
    scale: float = 0.5,
    clip: float = 100.0,
    discount: float = 1.0,
    per_length: bool = True,
    whiten: bool = True,
) -> dict[str, Tensor]:
    """`advantage` of MiniLLM (arXiv 2306.08543): R_t = sum_{u >= t} (log t_u - log s_old,u) / scale.

    Args:
        scale: divides each token's reward; published 0.5.
        clip: then bounds it by +-clip; published 100.
        discount: gamma; 1 as published, 0 leaves each token its own reward.
        per_length: divides R_t by the number of tokens from t on.
        whiten: subtracts the mean over the batch's live tokens and divides by their standard deviation.
    """
    reward = ((batch.stats.teacher_logprob - log_old(batch)) / scale).clamp(-clip, clip)
    total = _to_go(batch, reward, discount)
    if per_length:
        left = batch.mask.flip(1).cumsum(1).flip(1)
        total = total / left.clamp(min=1)
    if whiten:
        total = total - batch_mean(total, batch.mask)
        total = total * (batch_mean(total.square(), batch.mask) + 1e-8).rsqrt()
    return {"advantage": on_live(batch, total)}


@prepare
def polarity(batch: Batch, *, clip: float = 3.0, threshold: float = 0.05) -> dict[str, Tensor]:
    """`teacher_weight` of SGSD (arXiv 2605.28791): outcome sign times support sign, times a given weight.

    A teacher's support is the row's mean of clip(log t_m - log s, +-3); its sign is 0 within the threshold.
    The outcome's sign is +1 for right rollouts, -1 for wrong ones.
    """
    gap = per_teacher(batch, "teacher_logprobs") - batch.stats.student_logprob[..., None]
    live = batch.mask[..., None]
    mean = torch.where(live, gap.clamp(-clip, clip), 0.0).sum(1) / live.sum(1).clamp(min=1)
    support = torch.where(mean.abs() > threshold, mean.sign(), 0.0)
    outcome = torch.where(batch["correct"].bool(), 1.0, -1.0)
    weight = (outcome[:, None] * support)[:, None, :]
    if "teacher_weight" in batch.data:
        weight = weight * per_teacher(batch, "teacher_weight")
    return {"teacher_weight": torch.where(live, weight, 0.0)}


@prepare
def margin_calibration(
    batch: Batch, *, delta: float = 0.4, mode: str = "both", gap: str = "mean", limit: float = 10.0
) -> dict[str, Tensor]:
    """`advantage` of Uni-OPD (arXiv 2605.03677): log t - log s, shifted where wrong rollouts look right.

    G_i is the mean of log t - log s over rollout i's tokens. Where, in a group with both kinds, the gap
    between right and wrong ones is below delta, the missing part is added to the right ones' tokens or taken
    from the wrong ones'. Tokens with |log t - log s| >= limit have advantage 0.

    Args:
        delta: nats per token.
        mode: `"correct_up"`, `"incorrect_down"`, or `"both"`, half each (published).
        gap: `"mean"`: of the right G, minus that of the wrong; `"extremes"`: smallest right minus largest
            wrong.
        limit: nats.
    """
    check_choice("mode", mode, ("correct_up", "incorrect_down", "both"))
    check_choice("gap", gap, ("mean", "extremes"))
    reward = batch.stats.teacher_logprob - batch.stats.student_logprob
    kept = batch.mask & (reward.abs() < limit)
    score, right = row_mean(reward, kept), batch["correct"].bool()
    index, groups = group_index(batch)
    sides = [side & kept.any(1) for side in (right, ~right)]
    counts = [group_sum(side.to(score.dtype), index, groups) for side in sides]
    if gap == "mean":
        ends = [
            group_sum(torch.where(side, score, 0.0), index, groups) / n.clamp(min=1)
            for side, n in zip(sides, counts, strict=True)
        ]
    else:
        ends = [-group_max(-score, sides[0], index, groups), group_max(score, sides[1], index, groups)]
    both = (counts[0] > 0) & (counts[1] > 0)
    missing = torch.where(both, (delta - (ends[0] - ends[1])).clamp(min=0), 0.0)
    up = {"correct_up": 1.0, "incorrect_down": 0.0, "both": 0.5}[mode]
    shift = torch.where(right, up * missing, -(1 - up) * missing)
    return {"advantage": torch.where(kept, reward + shift[:, None], 0.0)}


@prepare
def omniopd(batch: Batch, *, alpha: float = 1.0, samples: int = 10) -> dict[str, Tensor]:
    """`coefficient` pi = (k + alpha p) / (N + alpha) of audited tokens (OmniOPD, arXiv 2606.01476).

    k is `similarity`, the sum of the N similarities of the token's `chunk`; p is exp of its mean log s.
    Tokens of no chunk (-1) have 0. Published: N 10; no alpha is.

    Args:
        alpha: weight of the student's own confidence.
        samples: N, continuations per chunk.
    """
    mean, _, chunk = segment_mean(batch.stats.student_logprob, batch["chunk"], batch.mask)
    own = mean.exp().gather(1, chunk)
    share = (batch["similarity"] + alpha * own) / (samples + alpha)
    return {"coefficient": torch.where(batch.mask & (batch["chunk"] >= 0), share, 0.0)}


@prepare
def step_coefficient(
    batch: Batch, *, coefficient: float = 1.0, delta: float = 0.2, eps: float = 1e-6
) -> dict[str, Tensor]:
    """`coefficient` times w_k of the weight `step`: the factor of the teacher's part in SOD's advantage."""
    return {"coefficient": coefficient * step(batch, delta=delta, eps=eps)}


@prepare
def calm_coefficient(
    batch: Batch, *, coefficient: float = 1.25, calm: float = 1.0, threshold: float = 0.5
) -> dict[str, Tensor]:
    """`coefficient` of `extrapolated`: `calm` where H_t < threshold, else lambda (ListOPD, 2605.08737).

    The paper keeps lambda at or below 1 on tokens that the format needs. To tell them by the teacher's
    entropy alone is this package's choice; the paper's closed form for lambda is not implemented.

    Args:
        coefficient: lambda.
        calm: that of tokens of which the teacher is sure.
        threshold: in nats.
    """
    sure = batch.stats.teacher_entropy < threshold
    return {"coefficient": on_live(batch, torch.where(sure, calm, coefficient))}


@prepare
def first_share(batch: Batch) -> dict[str, Tensor]:
    """`coefficient` w_1 / W of two teachers' `teacher_weight`: the first one's power in their product."""
    if (count := batch["teacher_weight"].shape[-1]) != 2:
        raise ValueError(f"data['teacher_weight']: expected 2 teachers; got {count}")
    return {"coefficient": teacher_share(batch)[..., 0]}


@prepare
def acpo_bounds(
    batch: Batch,
    *,
    base: float = 0.2,
    alpha: float = 3.0,
    smallest: float = 0.0,
    largest: float = 3.0,
    bins: int = 5,
) -> dict[str, Tensor]:
    """`clip_low` and `clip_high`, both clamp(base + alpha std(r), smallest, largest) (ACPO's released code).

    r = s / s_old. Its standard deviation, sqrt(population variance + 1e-8), is that of the live tokens whose
    s is in the same of `bins` equal parts of [0, 1]. The defaults are the published ones.
    """
    log_s = on_live(batch, batch.stats.student_logprob)
    ratio = on_live(batch, (log_s - log_old(batch)).clamp(-LOG_LIMIT, LOG_LIMIT).exp())
    part = (log_s.exp() * bins).long().clamp(0, bins - 1)
    bound = torch.full_like(ratio, base)
    for number in range(bins):
        inside = batch.mask & (part == number)
        mean = batch_mean(ratio, inside)
        deviation = (batch_mean((ratio - mean).square(), inside) + 1e-8).sqrt()
        bound = torch.where(inside, (base + alpha * deviation).clamp(smallest, largest), bound)
    return {"clip_low": bound, "clip_high": bound.clone()}


def _to_go(batch: Batch, values: Tensor, discount: float) -> Tensor:
    """`[B, C]` G_t = x_t + discount G_{t + 1} over the live tokens of each row; dead ones are skipped.

    A scan of log2(C) steps over the maps G -> total + factor G.
    """
    total = on_live(batch, values)
    factor = torch.ones_like(total).masked_fill(batch.mask, discount)
    shift = 1
    while shift < total.shape[1]:
        # Beyond the row's end nothing is added.
        later = functional.pad(total[:, shift:], (0, shift))
        total = total + factor * later
        factor = factor * functional.pad(factor[:, shift:], (0, shift))
        shift *= 2
    return total

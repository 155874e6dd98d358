"""Weights that keep a share of the tokens, and gates."""

import torch
from torch import Tensor

from opsd_kernels.tokens import Batch
from opsd_kernels.weights.base import (
    check_choice,
    chosen,
    local,
    on_live,
    quantile,
    top_share,
    unit_range,
    weight,
)

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "log_ratio")


@weight
def tip(batch: Batch, *, share: float = 0.5, overconfident: bool = False) -> Tensor:
    """1 on the share of tokens with the largest h + d - h d (TIP, arXiv 2604.14084, eq. 2-5).

    h is the student's entropy and d = KL(s || t), each scaled to [0, 1] between its extremes over the batch's
    live tokens. The loss's denominator is the number of kept tokens.

    Args:
        share: rho; published 0.5, or 0.2. Rounded up.
        overconfident: ranks by (1 - h) d instead, the sure and wrong tokens (Q3; less than 0.1 suffices).
    """
    h, d = (_between(batch, x, 0.0, 1.0) for x in (batch.stats.student_entropy, batch.stats.reverse_kl))
    return top_share((1 - h) * d if overconfident else h + d - h * d, batch.mask, share).float()


@weight
def tip_sample(batch: Batch, *, share: float = 0.5, alpha: float = 1.0, gamma: float = 1.0) -> Tensor:
    """1 on tokens drawn without replacement with odds H_s^alpha JSD^gamma: the sampler of TIP's code.

    A token with odds 0 is drawn only when no other is left. The draw is that of torch's global generator.
    """
    odds = batch.stats.student_entropy.clamp(min=0) ** alpha * batch.stats.jsd.clamp(min=0) ** gamma
    # The largest keys log w + Gumbel noise are a draw without replacement.
    noise = -torch.empty_like(odds).exponential_().log()
    return top_share(odds.clamp(min=torch.finfo(odds.dtype).tiny).log() + noise, batch.mask, share).float()


@weight
def ta_opd(batch: Batch, *, share: float = 0.05, divergence: str = "reverse_kl") -> Tensor:
    """1 on the share of tokens with the largest D C, D the divergence, C `teacher_mass` (arXiv 2605.26844).

    Each is scaled to [0, 1] between the batch's 5 % and 95 % quantiles. C is the teacher's mass on the
    student's top 16.

    Args:
        share: published 0.05. Rounded up.
        divergence: `"reverse_kl"`, `"forward_kl"`, `"jsd"` or `"log_ratio"`, |log t - log s| of the token.
    """
    columns = (_divergence(batch, divergence), batch["teacher_mass"])
    d, c = (_between(batch, x, 0.05, 0.95) for x in columns)
    return top_share(d * c, batch.mask, share).float()


@weight
def top_divergence(
    batch: Batch, *, share: float = 0.1, divergence: str = "log_ratio", per_row: bool = False
) -> Tensor:
    """1 on the share of the most divergent tokens (GenEvolve, arXiv 2605.21605: 0.1).

    Args:
        share: of the live tokens, rounded up.
        divergence: as in `ta_opd`.
        per_row: ranks within each row instead of the batch.
    """
    return top_share(_divergence(batch, divergence), batch.mask, share, per_row).float()


@weight
def below_quantile(
    batch: Batch, *, level: float = 0.99, divergence: str = "forward_kl", mode: str = "zero"
) -> Tensor:
    """A clip of the token's loss at a quantile q of the batch, as a weight (UniSD, 2605.06597: 0.99).

    Args:
        level: of the quantile over the live tokens.
        divergence: as in `ta_opd`; that of the term.
        mode: `"zero"`, the gradient of min(l, q): tokens above q have none, and the constants q that they add
            to the value are left out. `"scale"`: min(1, q / l), whose value is min(l, q), and whose gradient
            shrinks instead of vanishing.
    """
    check_choice("mode", mode, ("zero", "scale"))
    values = _divergence(batch, divergence)
    bound = quantile(values, batch.mask, level)
    if mode == "zero":
        return chosen(batch, values <= bound)
    return on_live(batch, torch.where(values > bound, bound / values, 1.0))


@local
def reward_above(batch: Batch, *, floor: float = -2.558) -> Tensor:
    """1[log t - log s > floor]: the first phase of REOPOLD, floor log(lambda) / (1 - lambda), lambda 0.1."""
    return chosen(batch, batch.stats.teacher_logprob - batch.stats.student_logprob > floor)


@local
def trust_region(batch: Batch, *, inside: bool = True) -> Tensor:
    """1 with the probability min(t / s, 1) of the sampled token (TrOPD, arXiv 2606.01249).

    Needs the data's `draw`, as the preparer of that name makes it.

    Args:
        inside: False for the other tokens, the outliers.
    """
    ratio = (batch.stats.teacher_logprob - batch.stats.student_logprob).exp()
    return chosen(batch, (batch["draw"] < ratio) == inside)


@local
def contrast_gate(
    batch: Batch, *, tau: float = 0.02, strength: float = 0.5, threshold: float = 0.02, inside: bool = True
) -> Tensor:
    """1 where |strength tanh((log t - log t_bad) / tau)| > threshold (RLCSD, arXiv 2606.11709).

    Args:
        tau: as in the advantage `rlcsd`; `strength` too.
        threshold: below it right and wrong hints say the same of the token.
        inside: False for the other tokens.
    """
    contrast = batch.stats.teacher_logprob - batch["negative_logprob"]
    return chosen(batch, (strength * (contrast / tau).tanh().abs() > threshold) == inside)


@local
def likely(batch: Batch, *, floor: float = -5.0) -> Tensor:
    """1[log s >= floor] at the sampled token (RLTF-SD, arXiv 2602.02482: -5)."""
    return chosen(batch, batch.stats.student_logprob >= floor)


@local
def selected(batch: Batch, *, accept: float = 1.0, reject: float = 0.0) -> Tensor:
    """`accept` where the data's `selected` is true, else `reject` (SelecTKD rejects with 0.01)."""
    return on_live(batch, torch.where(batch.per_token("selected").bool(), accept, reject))


@local
def correct(batch: Batch, *, value: bool = True) -> Tensor:
    """1 on the rollouts whose `correct` is `value`: SCOPE, TRACE, SRPO's routes."""
    return chosen(batch, batch.per_token("correct").bool() == value)


@local
def privileged(batch: Batch, *, value: bool = True) -> Tensor:
    """1 on the rollouts whose `privileged` is `value` (SDPO's rows with a reprompt)."""
    return chosen(batch, batch.per_token("privileged").bool() == value)


@local
def sdpo_route(batch: Batch, *, value: bool = True) -> Tensor:
    """1 on rollouts that are wrong and privileged, z = (1 - c) m, or on all others (SRPO, arXiv 2604.02288).

    Args:
        value: False for 1 - z, the rollouts of SRPO's GRPO branch.
    """
    routed = ~batch.per_token("correct").bool() & batch.per_token("privileged").bool()
    return chosen(batch, routed == value)


@local
def reward_at_least(batch: Batch, *, threshold: float = 1.0) -> Tensor:
    """1[reward >= threshold]: KEPO (arXiv 2602.00400) 1, SDPO's success 0.5; d-OPSD drops reward 0."""
    return chosen(batch, batch.per_token("reward") >= threshold)


@weight
def span(batch: Batch, *, code: int, per_length: bool = False) -> Tensor:
    """1 on tokens whose `span` is the code: 1 key, 2 error, 0 neither (TRACE, arXiv 2605.10194).

    Args:
        code: the span's.
        per_length: divides by the row's live tokens |y|. The sum over a row is then TRACE's mean over the
            span times |span| / |y|.
    """
    inside = chosen(batch, batch["span"] == code)
    return inside / batch.mask.sum(1, keepdim=True).clamp(min=1) if per_length else inside


@local
def turn(batch: Batch, *, first: int = 0, last: int | None = None) -> Tensor:
    """1 on the turns `first` to `last`, both included; None for all later ones (TCOD, TT-OPD)."""
    index = batch["turn"]
    inside = index >= first
    return chosen(batch, inside if last is None else inside & (index <= last))


def _divergence(batch: Batch, name: str) -> Tensor:
    check_choice("divergence", name, DIVERGENCES)
    if name == "log_ratio":
        return (batch.stats.teacher_logprob - batch.stats.student_logprob).abs()
    found: Tensor = getattr(batch.stats, name)
    return found


def _between(batch: Batch, values: Tensor, low: float, high: float) -> Tensor:
    """`[B, C]` in [0, 1]: values between two quantiles of the batch."""
    ends = (quantile(values, batch.mask, q) for q in (low, high))
    return unit_range(values, batch.mask, *ends)

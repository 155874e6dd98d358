"""Advantages A of a sampled token: constants `[C]`, positive where log s shall grow.

`policy_gradient(advantage=...)` takes them by name, and sums of them ("data+teacher").
"""

import math

import torch
from torch import Tensor

from opsd_kernels.estimators.base import choice, clamped
from opsd_kernels.registry import Registry
from opsd_kernels.tokens import Tokens

STUDENTS = ("current", "old", "rollout")
PENALTIES = ("k1", "k2", "k3", "abs")

advantage: Registry = Registry("advantage")


@advantage
def data(x: Tokens) -> Tensor:
    """The caller's `advantage`: of rewards, of a group (the preparer `group_advantage`), a return-to-go."""
    return x["advantage"]


@advantage
def teacher(
    x: Tokens,
    *,
    student: str = "current",
    coefficient: float | None = 1.0,
    floor: float | None = None,
    clip: float | None = None,
    limit: float | None = None,
) -> Tensor:
    """A = coefficient (R + B), R = log t - log s: the sampled reverse KL as a reward.

    B is the value of the estimator's baseline, 0 without one (vOPD, arXiv 2605.07865: KL(s || t), of the
    whole vocabulary or renormalised on the student's top 100). Any B that the token y has no part in leaves
    the expected gradient as it is. The coefficient is 1 in OPD, TCOD (arXiv 2604.24005), Lightning OPD (arXiv
    2604.13010) and SOD (arXiv 2605.07725, times the w_k of the preparer `step_coefficient`).

    Args:
        student: `"current"` log s; `"old"`: log s_old, that of `old_logprob`; or `"rollout"`, that of
            `rollout_logprob` (tinker's recipe).
        coefficient: factor; None for the data's `coefficient`.
        floor: lower bound of R in nats. REOPOLD: log(lambda) / (1 - lambda), -2.558 for its lambda of 0.1.
        clip: bound of |R|.
        limit: tokens with |R| of at least this, or a NaN, have A = 0 (Uni-OPD, arXiv 2605.03677: 10).
    """
    choice("student", student, STUDENTS)
    if student == "rollout":
        log_s = x["rollout_logprob"]
    else:
        log_s = x.log_s.detach() if student == "current" else x.log_old
    distance = x.teacher - log_s
    reward = distance if floor is None else distance.clamp(min=floor)
    reward = clamped(reward, clip)
    if x.baseline is not None:
        reward = reward + x.baseline
    reward = _coefficient(x, coefficient) * reward
    return reward if limit is None else reward.where(distance.abs() < limit, 0.0)


@advantage
def extrapolated(x: Tokens, *, coefficient: float | None = 1.25) -> Tensor:
    """A = -[(log s_old - log b) - lambda (log t - log b)] (G-OPD/ExOPD, arXiv 2602.12125).

    b is a frozen reference, `reference_logprob`: the student's start, or the teacher's base model. lambda = 1
    is plain OPD. The expected gradient is that of KL(s || b^(1 - lambda) t^lambda / Z). ListOPD (arXiv
    2605.08737) has a lambda per token.

    Args:
        coefficient: lambda; None for the data's `coefficient`.
    """
    base = x["reference_logprob"]
    return _coefficient(x, coefficient) * (x.teacher - base) - (x.log_old - base)


@advantage
def teacher_over_reference(x: Tokens) -> Tensor:
    """A = log t - log b, which does not know the student (ERPD's second stage, arXiv 2605.25582).

    Meant for a clipped surrogate, whose trust region holds the student.
    """
    return x.teacher - x["reference_logprob"]


@advantage
def power(x: Tokens, *, exponent: float = 0.5, scaled: bool = False) -> Tensor:
    """A = t^a - s^a, bounded by 1 (PowerOPD, arXiv 2606.17199).

    Args:
        exponent: a, above 0.
        scaled: divides by a (Box and Cox), so that a -> 0 is log t - log s.
    """
    if exponent <= 0:
        raise ValueError(f"exponent: expected a number above 0; got {exponent!r}")
    difference = (exponent * x.teacher).exp() - (exponent * x.log_s.detach()).exp()
    return difference / exponent if scaled else difference


@advantage
def penalty(x: Tokens, *, form: str = "k3", penalty_clip: float | None = 10.0) -> Tensor:
    """A = -f(l) for l = log s - log t: verl's distillation loss as a reward.

    Args:
        form: `"k1"` l, `"k2"` l^2 / 2, `"k3"` e^-l - 1 + l (verl's default) or `"abs"` |l|.
        penalty_clip: bound of |f|.
    """
    choice("form", form, PENALTIES)
    difference = x.log_s.detach() - x.teacher
    if form == "k1":
        value = difference
    elif form == "k2":
        value = difference.square() / 2
    elif form == "k3":
        value = (-difference).expm1() + difference
    else:
        value = difference.abs()
    return -clamped(value, penalty_clip)


@advantage
def divergence(x: Tokens) -> Tensor:
    """A = -B, minus the value of the estimator's baseline divergence.

    LSM's released code does this (arXiv 2603.25562: reverse KL of the student's top 32, renormalised). A does
    not depend on the token y, so that its expected gradient over y ~ s is exactly zero.
    """
    if x.baseline is None:
        raise ValueError("baseline: expected a divergence, which is this advantage; got None")
    return -x.baseline


@advantage
def rlsd(x: Tokens, *, mix: float = 0.5, width: float = 0.2) -> Tensor:
    """A [(1 - lambda) + lambda w], w = clip((t / s)^sign(A), 1 - eps, 1 + eps) (RLSD).

    A is the data's `advantage`: the teacher moves its size, never its sign.

    Args:
        mix: lambda; published 0.5, falling to 0 over 50 steps.
        width: eps; published 0.2.
    """
    return _credit(x, x.teacher - x.log_s.detach(), mix, width)


@advantage
def cepo(x: Tokens, *, mix: float = 0.5, width: float = 0.2) -> Tensor:
    """As `rlsd` with w = clip((t / t_bad)^sign(A), 1 +- eps) (CEPO, arXiv 2605.19436).

    t saw the right answer, t_bad (`negative_logprob`) a wrong one. A token without a bad teacher has the
    teacher's own log-prob there, hence w = 1.

    Args:
        mix: lambda; published 0.5, falling to 0 over 25 steps.
        width: eps; published 0.2.
    """
    return _credit(x, x.teacher - x["negative_logprob"], mix, width)


@advantage
def rlrt(x: Tokens, *, mix: float = 0.5, width: float = 1.0) -> Tensor:
    """As `rlsd` with w = clip((s / t)^sign(A), 1 +- eps) on right rollouts; A itself on the others (RLRT).

    What the student chose by itself, and was right with, counts more (arXiv 2605.10781).

    Args:
        mix: lambda; published 0.5.
        width: eps; published 1 for base models, 0.5 for instructed and 0.2 for thinking ones.
    """
    reversed_credit = _credit(x, x.log_s.detach() - x.teacher, mix, width)
    return torch.where(x["correct"].bool(), reversed_credit, x["advantage"])


@advantage
def rlcsd(x: Tokens, *, tau: float = 0.02, strength: float = 0.5) -> Tensor:
    """A + strength tanh((log t - log t_bad) / tau), or 0 where that has another sign than A (RLCSD).

    A is the data's `advantage`; t saw a right rollout, t_bad (`negative_logprob`) is the mean of those that
    saw wrong ones (arXiv 2606.11709).

    Args:
        tau: scale of the contrast in nats; published 0.02.
        strength: published 0.5.
    """
    outcome = x["advantage"]
    moved = outcome + strength * ((x.teacher - x["negative_logprob"]) / tau).tanh()
    return torch.where(moved.sign() == outcome.sign(), moved, 0.0)


@advantage
def consensus(x: Tokens) -> Tensor:
    """A = log q_G + lambda J - log s of M views of one teacher (AVSD's released scripts, arXiv 2605.20643).

    With D_m = log t_m - log s: log q_G - log s is the mean of D_m, J >= 0 the log of the views' arithmetic
    mean over their geometric one, lambda = |mean D| / (mean |D| + eps) |mean D| / (|mean D| + J + eps), eps
    1e-8. q_G is not normalised, as it is in the target `consensus`. Needs `teacher_logprobs`.
    """
    differences = x["teacher_logprobs"] - x.log_s.detach()[:, None]
    mean = differences.mean(-1)
    gap = (differences.logsumexp(-1) - math.log(differences.shape[-1]) - mean).clamp(min=0)
    size = mean.abs()
    gate = size / (differences.abs().mean(-1) + 1e-8) * size / (size + gap + 1e-8)
    return mean + gate * gap


@advantage
def agreeing(x: Tokens, *, agree: float = 1.0, disagree: float = 0.0) -> Tensor:
    """c (log t - log s), c by whether the teacher's sign is that of the data's `advantage` (RG-OPD, SG-OPD).

    With 1 and 0 a gate; SG-OPD (arXiv 2606.09304) extrapolates where they agree and interpolates elsewhere.

    Args:
        agree: c where sign(log t - log s) = sign(A).
        disagree: c elsewhere.
    """
    reward = x.teacher - x.log_s.detach()
    return torch.where(reward.sign() == x["advantage"].sign(), agree * reward, disagree * reward)


def _credit(x: Tokens, evidence: Tensor, mix: float, width: float) -> Tensor:
    outcome = x["advantage"]
    factor = (outcome.sign() * evidence).exp().clamp(1 - width, 1 + width)
    return outcome * ((1 - mix) + mix * factor)


def _coefficient(x: Tokens, coefficient: float | None) -> float | Tensor:
    return x["coefficient"] if coefficient is None else coefficient

"""Advantages and surrogates of the policy gradient against the papers' formulas in fp64."""

import math

import pytest
import torch
from torch import Tensor

from estimator_cases import BAD, LOG_S, LOG_T, OLD, close, column, evaluate, kl_gradient
from opsd_kernels.estimators import advantage, check_estimator, estimator
from opsd_kernels.tokens import Tokens

A = column(1.0, -0.5, 2.0, 0.0, -3.0, 0.7)
REFERENCE = column(-0.4, -1.0, -0.6, -5.0, -2.0, -3.3)
ROLLOUT = column(-0.15, -1.9, -0.8, -8.0, -0.4, -3.1)
RIGHT = column(1.0, 1.0, 0.0, 1.0, 0.0, 1.0).bool()
SCALE = column(1.2, 0.5, 1.0, 0.0, 2.0, 1.0)
DATA = {
    "advantage": A,
    "old_logprob": OLD,
    "reference_logprob": REFERENCE,
    "rollout_logprob": ROLLOUT,
    "negative_logprob": BAD,
    "teacher_logprobs": torch.stack((LOG_T, BAD), -1),
    "coefficient": SCALE,
    "correct": RIGHT,
}
R = LOG_T - LOG_S
X = Tokens(LOG_S, LOG_T, data=DATA)
FLOOR = math.log(0.1) / 0.9


def advantage_of(name: str, **options: object) -> Tensor:
    """Read off from the gradient of REINFORCE, which is -A."""
    value, gradient = evaluate("policy_gradient", X, advantage=name, **options)
    close((value, gradient), gradient * LOG_S, gradient)
    return -gradient


def factor(sign: Tensor, evidence: Tensor, mix: float, width: float) -> Tensor:
    w = torch.where(sign > 0, evidence.exp(), torch.where(sign < 0, (-evidence).exp(), 1.0))
    return 1 - mix + mix * torch.minimum(torch.maximum(w, column(1 - width)), column(1 + width))


def contrasted(tau: float, strength: float) -> Tensor:
    moved = A + strength * torch.tanh((LOG_T - BAD) / tau)
    return torch.where(A > 0, moved.clamp(min=0), torch.where(A < 0, moved.clamp(max=0), 0.0))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("data", {}, A),
        ("teacher", {}, R),
        ("teacher", {"student": "old"}, LOG_T - OLD),
        ("teacher", {"floor": FLOOR}, torch.maximum(R, column(FLOOR))),
        ("teacher", {"clip": 1.0}, R.clip(-1, 1)),
        ("teacher", {"limit": 5.0}, R * (R.abs() < 5)),
        ("teacher", {"coefficient": None}, SCALE * R),
        ("data+teacher", {"coefficient": 0.3, "student": "old"}, A + 0.3 * (LOG_T - OLD)),
        ("extrapolated", {}, -((OLD - REFERENCE) - 1.25 * (LOG_T - REFERENCE))),
        ("extrapolated", {"coefficient": None}, -((OLD - REFERENCE) - SCALE * (LOG_T - REFERENCE))),
        ("extrapolated", {"coefficient": 1.0}, LOG_T - OLD),
        ("teacher_over_reference", {}, LOG_T - REFERENCE),
        ("power", {"exponent": 0.7}, LOG_T.exp() ** 0.7 - LOG_S.exp() ** 0.7),
        ("power", {"exponent": 2.0, "scaled": True}, (LOG_T.exp() ** 2 - LOG_S.exp() ** 2) / 2),
        ("penalty", {"form": "k1", "penalty_clip": None}, R),
        ("penalty", {"form": "k2", "penalty_clip": None}, -(R**2) / 2),
        ("penalty", {}, -(R.exp() - 1 - R).clip(max=10)),
        ("penalty", {"form": "abs", "penalty_clip": 3.0}, -R.abs().clip(max=3)),
        ("rlsd", {}, A * factor(A, R, 0.5, 0.2)),
        ("rlsd", {"mix": 0.1, "width": 0.5}, A * factor(A, R, 0.1, 0.5)),
        ("cepo", {}, A * factor(A, LOG_T - BAD, 0.5, 0.2)),
        ("rlrt", {}, torch.where(RIGHT, A * factor(A, -R, 0.5, 1.0), A)),
        ("rlrt", {"mix": 0.1, "width": 0.5}, torch.where(RIGHT, A * factor(A, -R, 0.1, 0.5), A)),
        ("rlcsd", {}, contrasted(0.02, 0.5)),
        ("rlcsd", {"tau": 2.0, "strength": 1.5}, contrasted(2.0, 1.5)),
        ("agreeing", {}, torch.where(R * A > 0, R, 0.0)),
        ("agreeing", {"agree": 1.5, "disagree": 0.5}, torch.where(R * A > 0, 1.5 * R, 0.5 * R)),
    ],
)
def test_advantages(name, options, expected):
    torch.testing.assert_close(advantage_of(name, **options), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("coefficient", [1.0, 0.5])
def test_the_baseline_is_added_to_the_teachers_reward(coefficient):
    """vOPD: A = -(log s - log t - B), B >= 0 the divergence of the whole distributions."""
    b = column(0.1, 2.0, 0.0, 0.5, 1.0, 0.3)
    options = {"advantage": "data+teacher", "coefficient": coefficient, "clip": 1.0}
    found = evaluate("policy_gradient", Tokens(LOG_S, LOG_T, baseline=b, data=DATA), **options)
    a = A + coefficient * (R.clip(-1, 1) + b)
    close(found, -a * LOG_S, -a)


def test_power_tends_to_the_log_ratio():
    small = advantage_of("power", exponent=1e-8, scaled=True)
    torch.testing.assert_close(small, R, rtol=1e-6, atol=1e-6)


def test_the_limit_drops_a_failed_teacher():
    log_t = LOG_T.clone()
    log_t[1], log_t[2] = -100.0, math.nan
    value, gradient = evaluate("policy_gradient", Tokens(LOG_S, log_t), limit=10.0)
    assert value[1] == value[2] == gradient[1] == gradient[2] == 0
    assert value.isfinite().all()


def ppo_value(log_s: Tensor, log_b: Tensor, a: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """PPO's objective token by token, in branches."""
    values = []
    for s, b, adv, lo, hi in zip(log_s, log_b, a, low.expand(len(a)), high.expand(len(a)), strict=True):
        r = (s - b).exp()
        if adv >= 0 and r > 1 + hi:
            values.append(-(1 + hi) * adv)
        elif adv < 0 and r < 1 - lo:
            values.append(-(1 - lo) * adv)
        else:
            values.append(-r * adv)
    return torch.stack(values)


def autograd_of(function) -> tuple[Tensor, Tensor]:
    log_s = LOG_S.clone().requires_grad_()
    value = function(log_s)
    return value.detach(), torch.autograd.grad(value.sum(), log_s)[0]


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.05, 1e-3), (None, None)])
@pytest.mark.parametrize("behaviour", ["old", "rollout", "teacher"])
def test_ppo(low, high, behaviour):
    bounds = {
        "clip_low": column(0.1, 0.2, 0.3, 0.1, 0.2, 0.3),
        "clip_high": column(0.5, 0.01, 0.2, 0.1, 0.2, 0.3),
    }
    x = Tokens(LOG_S, LOG_T, data={**DATA, **bounds})
    log_b = {"old": OLD, "rollout": ROLLOUT, "teacher": LOG_T}[behaviour]
    below = bounds["clip_low"] if low is None else column(low)
    above = bounds["clip_high"] if high is None else column(high)
    expected = autograd_of(lambda log_s: ppo_value(log_s, log_b, A, below, above))
    options = {"advantage": "data", "surrogate": "ppo", "low": low, "high": high, "behaviour": behaviour}
    close(evaluate("policy_gradient", x, **options), *expected)


def test_ppo_without_old_logprobs_is_reinforce():
    x = Tokens(LOG_S, LOG_T)
    value, gradient = evaluate("policy_gradient", x, surrogate="ppo")
    close((value, gradient), -R, -R)


def test_dual_clip():
    """For A < 0 the loss is at most dual |A|, without gradient there."""
    log_s, old, a = column(-0.1, -0.1, -0.1, -0.1), column(-3.0, -0.5, -3.0, -0.1), column(-1, -1, 1, -2)
    x = Tokens(log_s, data={"advantage": a, "old_logprob": old})
    found = evaluate("policy_gradient", x, advantage="data", surrogate="ppo", dual=3.0)
    r = (log_s - old).exp()
    assert r[0] > 3
    value = torch.stack((column(3.0)[0], r[1], column(-1.2)[0], 2 * r[3]))
    close(found, value, torch.stack((0 * r[0], r[1], 0 * r[0], 2 * r[3])))


@pytest.mark.parametrize(("behaviour", "log_b"), [("old", OLD), ("rollout", ROLLOUT)])
def test_cispo_and_tis(behaviour, log_b):
    r = (LOG_S - log_b).exp().clip(max=1.1)
    options = {"advantage": "data", "surrogate": "cispo", "cap": 1.1, "behaviour": behaviour}
    close(evaluate("policy_gradient", X, **options), -r * A * LOG_S, -r * A)


def test_importance():
    r = (LOG_S - ROLLOUT).exp()
    close(evaluate("policy_gradient", X, advantage="data", surrogate="importance"), -r * A, -r * A)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_trrd(alpha):
    """Eq. of the ratio: s / (s_old^alpha t^(1 - alpha)); its endpoints are the teacher's ratio and PPO's."""
    base = alpha * OLD + (1 - alpha) * LOG_T
    expected = autograd_of(lambda log_s: ppo_value(log_s, base, A, column(0.2), column(0.2)))
    close(evaluate("policy_gradient", X, advantage="data", surrogate="trrd", alpha=alpha), *expected)


def test_min_logprob_drops_unlikely_tokens():
    close(
        evaluate("policy_gradient", X, advantage="data", min_logprob=-5.0),
        torch.where(LOG_S >= -5, -A * LOG_S, 0.0),
        torch.where(LOG_S >= -5, -A, 0.0),
    )


def test_the_advantage_is_a_constant():
    """Nothing flows through an advantage, however it is made."""
    for name in advantage.functions:
        x = Tokens(
            LOG_S, LOG_T, baseline=R.square() if name in ("divergence", "teacher") else None, data=DATA
        )
        value, gradient = evaluate("policy_gradient", x, advantage=name)
        torch.testing.assert_close(value, gradient * LOG_S)


def expected_over_tokens(z: Tensor, log_t: Tensor, baseline: float | None, **options: object) -> Tensor:
    s = z.log_softmax(0).detach().exp()
    total = torch.zeros_like(z)
    for y in range(len(z)):
        logits = z.clone().requires_grad_()
        b = None if baseline is None else column(baseline)
        x = Tokens(logits.log_softmax(0)[y : y + 1], log_t[y : y + 1], baseline=b)
        loss = estimator["policy_gradient"](x, **options).sum()
        total += s[y] * torch.autograd.grad(loss, logits)[0]
    return total


@pytest.fixture
def vocabulary() -> tuple[Tensor, Tensor]:
    z, z_t = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 2
    return z, z_t.log_softmax(0)


@pytest.mark.parametrize("surrogate", ["reinforce", "ppo", "cispo"])
def test_a_state_baseline_leaves_the_expected_gradient(vocabulary, surrogate):
    z, log_t = vocabulary
    wanted = kl_gradient(z, log_t, forward=False)
    for baseline in (None, 0.7, -3.0):
        found = expected_over_tokens(z, log_t, baseline, surrogate=surrogate)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_an_advantage_that_ignores_the_token_has_no_expected_gradient(vocabulary):
    z, log_t = vocabulary
    found = expected_over_tokens(z, log_t, 1.3, advantage="divergence")
    assert found.abs().max() < 1e-15
    one = Tokens(column(-1.0), column(-2.0), baseline=column(1.3))
    assert evaluate("policy_gradient", one, advantage="divergence")[1] == 1.3


def test_extrapolation_is_the_gradient_to_a_log_linear_target(vocabulary):
    z, log_t = vocabulary
    log_b = torch.linspace(-1, 1, 6, dtype=torch.float64).log_softmax(0)
    s = z.log_softmax(0)
    total = torch.zeros_like(z)
    for y in range(6):
        logits = z.clone().requires_grad_()
        x = Tokens(logits.log_softmax(0)[[y]], log_t[[y]], data={"reference_logprob": log_b[[y]]})
        loss = estimator["policy_gradient"](x, advantage="extrapolated", coefficient=1.25).sum()
        total += s[y].exp() * torch.autograd.grad(loss, logits)[0]
    target = (1.25 * log_t - 0.25 * log_b).log_softmax(0)
    torch.testing.assert_close(total, kl_gradient(z, target, forward=False), rtol=1e-10, atol=1e-12)


def test_wrong_calls():
    with pytest.raises(ValueError, match=r"advantage: expected one of data, teacher.*; got 'both'"):
        check_estimator("policy_gradient", {"advantage": "both"})
    with pytest.raises(ValueError, match=r"surrogate: expected one of reinforce.*; got 'grpo'"):
        check_estimator("policy_gradient", {"surrogate": "grpo"})
    with pytest.raises(ValueError, match=r"options: expected some of .*; got 'cap'"):
        evaluate("policy_gradient", X, surrogate="ppo", cap=2.0)
    with pytest.raises(
        ValueError, match=r"behaviour: expected one of 'old', 'rollout', 'teacher'; got 'new'"
    ):
        evaluate("policy_gradient", X, surrogate="ppo", behaviour="new")
    with pytest.raises(ValueError, match=r"baseline: expected None unless with teacher, divergence; got one"):
        evaluate("policy_gradient", Tokens(LOG_S, LOG_T, baseline=R, data=DATA), advantage="data")
    with pytest.raises(ValueError, match=r"baseline: expected a divergence"):
        evaluate("policy_gradient", X, advantage="divergence")
    with pytest.raises(ValueError, match=r"exponent: expected a number above 0; got 0"):
        evaluate("policy_gradient", X, advantage="power", exponent=0)

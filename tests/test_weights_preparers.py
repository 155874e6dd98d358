"""Preparers against the papers' formulas in plain Python."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from opsd_kernels.preparers import prepare
from opsd_kernels.tokens import Batch
from opsd_kernels.weights import weight
from weight_cases import CORRECT, GROUP, MASK, assert_weights, batch, by_row, with_data, without


@pytest.fixture
def b() -> Batch:
    return batch()


def rows(values: list[float]) -> Tensor:
    return MASK * torch.tensor(values, dtype=torch.float64)[:, None]


def peers(row: int) -> list[int]:
    return [other for other in range(len(MASK)) if GROUP[other] == GROUP[row]]


@pytest.mark.parametrize("deviation", [True, False])
@pytest.mark.parametrize("leave_one_out", [True, False])
def test_group_advantage(b, deviation, leave_one_out):
    reward = b.data["reward"].tolist()
    expected = []
    for row in range(len(MASK)):
        group = [reward[other] for other in peers(row)]
        others = [reward[other] for other in peers(row) if other != row] if leave_one_out else group
        gap = reward[row] - statistics.fmean(others) if others else 0.0
        spread = statistics.stdev(group) if len(group) > 1 else 0.0
        expected.append(gap / (spread + 1e-4) if deviation else gap)
    found = prepare["group_advantage"](b, deviation=deviation, leave_one_out=leave_one_out)["advantage"]
    assert_weights(found, rows(expected))


def test_group_advantage_of_equal_rewards_is_zero(b):
    b = with_data(b, reward=torch.ones(len(MASK), dtype=torch.int64))
    assert not prepare["group_advantage"](b)["advantage"].any()


def to_go(values: list[float], discount: float) -> list[float]:
    """sum_{u >= t} discount^(u - t) x_u over the row's live tokens."""
    return [sum(discount ** (u - t) * values[u] for u in range(t, len(values))) for t in range(len(values))]


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
def test_future_cross_entropy(b, discount):
    def row(kl: list[float], h: list[float]) -> list[float]:
        cost = [x + y for x, y in zip(kl, h, strict=True)]
        return [-x for x in to_go(cost, discount)[1:]] + [0.0]

    found = prepare["future_cross_entropy"](b, discount=discount)["advantage"]
    assert_weights(found, by_row(b, row, b.stats.forward_kl, b.stats.teacher_entropy))


def test_future_cross_entropy_is_the_gradient_of_the_rollouts_cost():
    """Two steps over two tokens: d/dtheta E[CE_1 + CE_2(y_1)], the expectation enumerated."""
    z = torch.tensor([[0.3, -0.4], [1.0, 0.2], [-0.5, 0.1]], dtype=torch.float64, requires_grad=True)
    log_s = z.log_softmax(1)  # of the root and of the two states after it
    t = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.7, 0.3]], dtype=torch.float64)
    cost = -(t * log_s).sum(1)
    objective = cost[0] + (log_s[0].exp() * cost[1:]).sum()
    wanted = torch.autograd.grad(objective, z, retain_graph=True)[0]

    total = torch.zeros((), dtype=torch.float64)
    for first in range(2):
        entropy = -(t * t.log()).sum(1)
        b = batch(mask=torch.ones(1, 2, dtype=torch.bool))
        for column, values in ((b.stats.forward_kl, cost - entropy), (b.stats.teacher_entropy, entropy)):
            column[0] = values.detach()[[0, 1 + first]]
        a = prepare["future_cross_entropy"](b)["advantage"][0]
        loss = cost[0] + cost[1 + first] - a[0] * log_s[0, first]
        total = total + log_s[0, first].exp().detach() * loss
    torch.testing.assert_close(torch.autograd.grad(total, z)[0], wanted)


@pytest.mark.parametrize("discount", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("per_length", [True, False])
@pytest.mark.parametrize("whiten", [True, False])
def test_reward_to_go(b, discount, per_length, whiten):
    def row(log_t: list[float], old: list[float]) -> list[float]:
        reward = [max(min((x - y) / 0.5, 4), -4) for x, y in zip(log_t, old, strict=True)]
        total = to_go(reward, discount)
        return [x / (len(total) - i) if per_length else x for i, x in enumerate(total)]

    expected = by_row(b, row, b.stats.teacher_logprob, b.data["old_logprob"])
    if whiten:
        live = expected[MASK].tolist()
        mean, spread = statistics.fmean(live), math.sqrt(statistics.pvariance(live) + 1e-8)
        expected[MASK] = (expected[MASK] - mean) / spread
    options = {"discount": discount, "per_length": per_length, "whiten": whiten, "clip": 4.0}
    assert_weights(prepare["reward_to_go"](b, **options)["advantage"], expected)


def test_to_go_over_a_long_row():
    """The scan agrees with the recursion where sums are long and tokens are missing."""
    mask = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0)) > 0.3
    b = batch(mask=mask)
    found = prepare["reward_to_go"](b, discount=0.99, per_length=False, whiten=False, clip=1e9)["advantage"]
    reward = torch.where(mask, (b.stats.teacher_logprob - b.data["old_logprob"]) / 0.5, 0.0)
    total = torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(1000)):
        total = torch.where(mask[:, t], reward[:, t] + 0.99 * total, total)
        torch.testing.assert_close(found[:, t], torch.where(mask[:, t], total, 0.0))


def test_polarity(b):
    log_s, teachers = b.stats.student_logprob, b.data["teacher_logprobs"]
    found = prepare["polarity"](without(b, "teacher_weight"), threshold=0.4)["teacher_weight"]
    signs = torch.zeros(*MASK.shape, 3, dtype=torch.float64)
    for row in range(len(MASK)):
        for m in range(3):
            gaps = [
                max(min(x - y, 3), -3)
                for x, y in zip(
                    teachers[row, :, m][MASK[row]].tolist(), log_s[row][MASK[row]].tolist(), strict=True
                )
            ]
            score = statistics.fmean(gaps) if gaps else 0.0
            support = 0 if abs(score) <= 0.4 else math.copysign(1, score)
            signs[row, :, m] = MASK[row] * support * (1 if CORRECT[row] else -1)
    assert signs.unique().tolist() == [-1, 0, 1]
    assert_weights(found, signs)
    given = torch.rand(len(MASK), 3, dtype=torch.float64)
    weighted = prepare["polarity"](with_data(b, teacher_weight=given), threshold=0.4)["teacher_weight"]
    assert_weights(weighted, signs * given[:, None, :])


@pytest.mark.parametrize("mode", ["both", "correct_up", "incorrect_down"])
@pytest.mark.parametrize("gap", ["mean", "extremes"])
def test_margin_calibration(b, mode, gap):
    reward, limit, delta = b.stats.teacher_logprob - b.stats.student_logprob, 4.0, 1.5
    kept = MASK & (reward.abs() < limit)
    assert kept.sum() < MASK.sum()
    score = [reward[r][kept[r]].mean().item() if kept[r].any() else None for r in range(len(MASK))]
    shifts = []
    for row in range(len(MASK)):
        right = [score[o] for o in peers(row) if CORRECT[o] and score[o] is not None]
        wrong = [score[o] for o in peers(row) if not CORRECT[o] and score[o] is not None]
        missing = 0.0
        if right and wrong:
            means = statistics.fmean(right) - statistics.fmean(wrong)
            distance = means if gap == "mean" else min(right) - max(wrong)
            missing = max(delta - distance, 0.0)
        up, down = {"both": (0.5, 0.5), "correct_up": (1, 0), "incorrect_down": (0, 1)}[mode]
        shifts.append(up * missing if CORRECT[row] else -down * missing)
    assert any(shifts)
    expected = torch.where(kept, reward + torch.tensor(shifts, dtype=torch.float64)[:, None], 0.0)
    found = prepare["margin_calibration"](b, delta=delta, mode=mode, gap=gap, limit=limit)["advantage"]
    assert_weights(found, expected)


def test_margin_calibration_reaches_its_margin(b):
    """Afterwards the mean gap of a group that was too small is delta."""
    found = prepare["margin_calibration"](b, delta=5.0, limit=1e9)["advantage"]
    mean = [found[r][MASK[r]].mean().item() for r in range(3)]
    assert (mean[0] + mean[2]) / 2 - mean[1] == pytest.approx(5.0)


def test_a_wide_margin_stays(b):
    found = prepare["margin_calibration"](b, delta=-50.0)["advantage"]
    assert_weights(found, torch.where(MASK, b.stats.teacher_logprob - b.stats.student_logprob, 0.0))


def test_omniopd(b):
    def row(log_s: list[float], similarity: list[float], chunk: list[float]) -> list[float]:
        found = []
        for k, c in zip(similarity, chunk, strict=True):
            if c < 0:
                found.append(0.0)
                continue
            mean = statistics.fmean(x for x, other in zip(log_s, chunk, strict=True) if other == c)
            found.append((k + 2.5 * math.exp(mean)) / (10 + 2.5))
        return found

    found = prepare["omniopd"](b, alpha=2.5)["coefficient"]
    expected = by_row(b, row, b.stats.student_logprob, b.data["similarity"], b.data["chunk"])
    assert_weights(found, expected)
    assert_weights(weight["coefficient"](with_data(b, coefficient=found)), expected)


def test_step_coefficient(b):
    found = prepare["step_coefficient"](b, coefficient=3.0, delta=0.5)["coefficient"]
    assert_weights(found, 3 * weight["step"](b, delta=0.5))


def test_calm_coefficient(b):
    found = prepare["calm_coefficient"](b, coefficient=1.5, calm=0.9, threshold=1.0)["coefficient"]
    expected = by_row(b, lambda h: [0.9 if x < 1 else 1.5 for x in h], b.stats.teacher_entropy)
    assert_weights(found, expected)


def test_acpo_bounds(b):
    log_s = torch.where(MASK, b.stats.student_logprob / 3, 0.0)  # spread over all bins
    b.stats.student_logprob[:] = torch.where(MASK, log_s, 1000.0)
    s = log_s.exp()
    ratio = (log_s - b.data["old_logprob"]).exp()
    expected = torch.full(MASK.shape, math.nan, dtype=torch.float64)
    bins = 0
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = MASK & (s >= low) & (s < low + 0.2)
        if inside.any():
            spread = math.sqrt(statistics.pvariance(ratio[inside].tolist()) + 1e-8)
            expected[inside] = min(max(0.2 + 3 * spread, 0.0), 30.0)
            bins += 1
    assert bins >= 4
    assert (s[MASK] < 0.2).any()
    found = prepare["acpo_bounds"](b, largest=30.0)
    for name in ("clip_low", "clip_high"):
        torch.testing.assert_close(found[name][MASK], expected[MASK])
    capped = prepare["acpo_bounds"](b)
    torch.testing.assert_close(capped["clip_low"][MASK], expected[MASK].clamp(max=3.0))


def test_wrong_options(b):
    with pytest.raises(ValueError, match=r"mode: expected one of 'correct_up', 'incorrect_down', 'both'"):
        prepare["margin_calibration"](b, mode="down")
    with pytest.raises(ValueError, match=r"gap: expected one of 'mean', 'extremes'; got 'median'"):
        prepare["margin_calibration"](b, gap="median")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leave_one_out", [True, False])
def test_group_advantage_of_a_share_that_is_rounded_is_exactly_zero(dtype, leave_one_out):
    data = {"reward": torch.full((8,), 0.35, dtype=dtype), "group": torch.zeros(8, dtype=torch.int64)}
    batch = Batch(torch.ones(8, 1, dtype=torch.bool), data)
    for eps in (1e-4, 1e-6, 0.0):
        found = prepare["group_advantage"](batch, eps=eps, leave_one_out=leave_one_out)["advantage"]
        assert torch.equal(found, torch.zeros_like(found))

"""The controller of how much of the solution the teacher sees."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from opsd_train.pieces.exposure import (
    EXPOSURE_FILE,
    Exposure,
    ExposureSettings,
    beta_parameters,
    controller_loss,
    window_reward,
)

SETTINGS = ExposureSettings(hold=3, horizon=60, discount=0.8, reference=0.2, learning_rate=0.1, seed=4)


def by_hand(weights: list[np.ndarray], state: np.ndarray) -> tuple[float, float]:
    inner, inner_bias, outer, outer_bias = weights
    raw = outer @ np.tanh(inner @ state + inner_bias) + outer_bias
    a, b = 1 + np.log1p(np.exp(raw))
    return float(a), float(b)


def entropy(a: float, b: float) -> float:
    """Minus the integral of f log f, by quadrature."""
    nodes, factors = np.polynomial.legendre.leggauss(1500)
    x = (nodes + 1) / 2
    log_f = (a - 1) * np.log(x) + (b - 1) * np.log1p(-x) - log_beta(a, b)
    return float(-(factors / 2 * np.exp(log_f) * log_f).sum())


def log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def loss_by_hand(weights: list[np.ndarray], state: np.ndarray, alpha: float, advantage: float) -> float:
    a, b = by_hand(weights, state)
    density = (a - 1) * math.log(alpha) + (b - 1) * math.log(1 - alpha) - log_beta(a, b)
    excess = max(0.0, entropy(a, b) - SETTINGS.target_entropy)
    return -advantage * density + SETTINGS.penalty * excess**2


def test_reward_of_a_window() -> None:
    losses, references = [2.0, 1.5, 1.75, 1.0], [-3.0, -2.0, -1.0]
    expected = 0.5 + 0.8 * 0.0 + 0.64 * 0.75 + 0.2 * (-3.0 - 0.8 * 2.0 - 0.64 * 1.0)
    assert window_reward(losses, references, SETTINGS) == pytest.approx(expected)
    first = window_reward(losses[1:], references, SETTINGS)
    expected = 0.8 * 0.0 + 0.64 * 0.75 + 0.2 * (-3.0 - 0.8 * 2.0 - 0.64 * 1.0)
    assert first == pytest.approx(expected)


@pytest.mark.parametrize("advantage", [1.3, -0.7, 0.0])
def test_gradient_of_the_controller(advantage: float) -> None:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=size) for size in ((16, 5), (16,), (2, 16), (2,))]
    state, alpha = rng.normal(size=5), 0.3
    tensors = [torch.tensor(weight, requires_grad=True) for weight in weights]
    assert [x.item() for x in beta_parameters(tensors, torch.tensor(state))] == pytest.approx(
        by_hand(weights, state)
    )
    loss = controller_loss(tensors, torch.tensor(state), alpha, advantage, SETTINGS)
    assert loss.item() == pytest.approx(loss_by_hand(weights, state, alpha, advantage))
    grads = torch.autograd.grad(loss, tensors)
    for index, where in ((0, (2, 1)), (1, (3,)), (2, (1, 4)), (3, (0,))):
        moved = []
        for step in (1e-5, -1e-5):
            nudged = [weight.copy() for weight in weights]
            nudged[index][where] += step
            moved.append(loss_by_hand(nudged, state, alpha, advantage))
        assert grads[index][where].item() == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_entropy_below_its_target_costs_nothing() -> None:
    weights = [np.zeros(size) for size in ((16, 5), (16,), (2, 16), (2,))]
    weights[3][:] = 30.0  # a = b = 31: an entropy of about -1
    tensors = [torch.tensor(weight) for weight in weights]
    assert controller_loss(tensors, torch.zeros(5, dtype=torch.float64), 0.5, 0.0, SETTINGS).item() == 0
    weights[3][:] = 0.0
    assert loss_by_hand(weights, np.zeros(5), 0.5, 0.0) > 0


def run(controller: Exposure, steps: range) -> list[float]:
    alphas = []
    for step in steps:
        alphas.append(controller.alpha)
        controller.observe(1 / (1 + step) + abs(controller.alpha - 0.8), -controller.alpha)
    return alphas


def test_share_is_held_for_a_window_and_determined_by_the_seed() -> None:
    alphas = run(Exposure(SETTINGS), range(30))
    assert all(len(set(alphas[start : start + 3])) == 1 for start in range(0, 30, 3))
    assert len(set(alphas)) == 10
    assert all(0 <= alpha <= 1 for alpha in alphas)
    assert alphas == run(Exposure(SETTINGS), range(30))
    assert alphas != run(Exposure(replace(SETTINGS, seed=5)), range(30))


def test_state_and_update_after_a_window() -> None:
    controller = Exposure(SETTINGS)
    for loss in (3.0, 2.5, 2.0):
        controller.observe(loss, -1.0)
    held, before = controller.alpha, [weight.numpy().copy() for weight in controller.weights]
    assert controller.state[:4] == [3 / 60, 2.0, 1.0, -1.0]
    assert controller.losses == [2.0]
    state = np.array(controller.state)
    rewards = [0.8 * 0.5 + 0.64 * 0.5 - 0.2 * (1 + 0.8 + 0.64)]
    assert controller.rewards == pytest.approx([1, rewards[0], rewards[0] ** 2])
    for loss in (1.0, 1.5, 0.5):
        controller.observe(loss, -2.0)
    assert controller.state == pytest.approx([6 / 60, 0.5, 1.5, -2.0, held])
    rewards.append(1.0 + 0.64 * 1.0 - 0.2 * 2 * (1 + 0.8 + 0.64))
    assert controller.rewards == pytest.approx([2, sum(rewards), sum(r**2 for r in rewards)])
    # With one reward before it there is no spread yet: the penalty on the entropy moves the weights alone.
    moved = loss_by_hand([before[0], before[1], before[2], before[3] + [1e-6, 0]], state, held, 0.0)
    lower = loss_by_hand([before[0], before[1], before[2], before[3] - [1e-6, 0]], state, held, 0.0)
    step = (controller.weights[3].numpy() - before[3])[0]
    assert step == pytest.approx(-0.1 * (moved - lower) / 2e-6, rel=1e-4)
    third, held = [weight.numpy().copy() for weight in controller.weights], controller.alpha
    state = np.array(controller.state)
    for loss in (0.25, 0.25, 0.25):
        controller.observe(loss, 0.0)
    advantage = (0.25 - np.mean(rewards)) / np.std(rewards)
    moved = loss_by_hand([*third[:3], third[3] + [1e-6, 0]], state, held, advantage)
    lower = loss_by_hand([*third[:3], third[3] - [1e-6, 0]], state, held, advantage)
    step = (controller.weights[3].numpy() - third[3])[0]
    assert step == pytest.approx(-0.1 * (moved - lower) / 2e-6, rel=1e-4)


def test_controller_finds_the_share_that_is_rewarded() -> None:
    controller = Exposure(ExposureSettings(hold=2, horizon=2000, reference=1.0, learning_rate=0.02, seed=1))
    drawn = []
    for _ in range(2000):
        drawn.append(controller.alpha)
        controller.observe(1.0, -abs(controller.alpha - 0.9))
    assert np.mean(drawn[:200]) < 0.7
    assert np.mean(drawn[-400:]) > 0.8


@pytest.mark.parametrize("stop", [9, 10])
def test_resumed_controller_goes_on(tmp_path: Path, stop: int) -> None:
    controller = Exposure(SETTINGS)
    whole = run(controller, range(stop))
    controller.save(tmp_path)
    rest = run(controller, range(stop, 24))
    other = Exposure(SETTINGS)
    other.load(tmp_path)
    assert run(other, range(stop, 24)) == rest
    assert whole + rest == run(Exposure(SETTINGS), range(24))


def test_wrong_controllers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"expected {EXPOSURE_FILE} in"):
        Exposure(SETTINGS).load(tmp_path)
    Exposure(SETTINGS).save(tmp_path)
    with pytest.raises(ValueError, match="to be of the same settings"):
        Exposure(replace(SETTINGS, hold=4)).load(tmp_path)
    with pytest.raises(ValueError, match="hold: expected at least 1; got 0"):
        ExposureSettings(hold=0)
    with pytest.raises(ValueError, match="discount: expected a number above 0 and at most 1; got 0"):
        ExposureSettings(discount=0)
    with pytest.raises(ValueError, match="loss: expected a finite number; got nan"):
        Exposure(SETTINGS).observe(math.nan)

"""Clipping and noise against per-example gradients of one's own, and epsilon against integrals and Opacus."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from opsd_train.pieces.private import PrivateGradient, epsilon, noise_multiplier_for, renyi


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).to(dtype)
    scale = torch.tensor([0.01, 0.1, 1.0, 5.0, 20.0], dtype=dtype)
    return model, torch.randn(5, 3, dtype=dtype), scale


def losses(model: torch.nn.Module, inputs: Tensor, scale: Tensor) -> list[Tensor]:
    return [(model(one[None]) ** 2).sum() * factor for one, factor in zip(inputs, scale, strict=True)]


def gradients(model: torch.nn.Module, inputs: Tensor, scale: Tensor) -> Tensor:
    """Per-example gradients, one flat row each, by `backward`."""
    rows = []
    for one in losses(model, inputs, scale):
        model.zero_grad()
        one.backward()
        rows.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    model.zero_grad()
    return torch.stack(rows)


def grad_of(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def make(model: torch.nn.Module, max_norm: float, noise: float, seed: int = 0) -> PrivateGradient:
    return PrivateGradient(model.parameters(), max_norm, noise, torch.Generator().manual_seed(seed))


def test_each_example_is_clipped_by_its_norm_over_all_parameters() -> None:
    given = problem()
    rows = gradients(*given)
    norms = rows.norm(dim=1)
    max_norm = norms.median().item()
    private = make(given[0], max_norm, 0.0)
    assert [private.add(one) for one in losses(*given)] == pytest.approx(norms.tolist())
    private.finish(batch_size=7.0)
    clipped = [row * min(1.0, max_norm / norm) for row, norm in zip(rows, norms, strict=True)]
    assert sum(bool(norm > max_norm) for norm in norms) == 2
    torch.testing.assert_close(grad_of(given[0]), torch.stack(clipped).sum(0) / 7)


def test_no_example_moves_the_sum_by_more_than_the_bound() -> None:
    given = problem()
    for i, one in enumerate(losses(*given)):
        private = make(given[0], 0.05, 0.0)
        private.add(one)
        private.finish(1.0)
        assert grad_of(given[0]).norm() <= 0.05 * (1 + 1e-12), i


def test_without_bound_and_noise_it_is_the_mean_gradient() -> None:
    given = problem()
    private = make(given[0], math.inf, 0.0)
    for _ in range(2):  # the second time from anew
        for one in losses(*given):
            private.add(one)
        private.finish(5.0)
    torch.testing.assert_close(grad_of(given[0]), gradients(*given).mean(0))


def test_noise_has_its_standard_deviation_in_every_step() -> None:
    model = torch.nn.Linear(200, 200)
    private = make(model, max_norm=0.5, noise=3.0)
    private.finish(batch_size=10.0)
    first = grad_of(model)
    assert first.std().item() == pytest.approx(3.0 * 0.5 / 10, rel=0.02)
    assert abs(first.mean().item()) < 0.004
    private.finish(batch_size=10.0)
    second = grad_of(model)
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 0.02
    again = make(model, max_norm=0.5, noise=3.0)
    again.finish(batch_size=10.0)
    assert torch.equal(grad_of(model), first)


def test_frozen_and_unused_parameters_and_two_byte_weights() -> None:
    model, inputs, scale = problem(torch.float32)
    model[0].weight.requires_grad_(False)
    model.to(torch.bfloat16)
    unused = torch.zeros(2, requires_grad=True)
    private = PrivateGradient([*model.parameters(), unused], math.inf, 0.0, torch.Generator())
    for one in losses(model, inputs.bfloat16(), scale):
        private.add(one)
    private.finish(5.0)
    assert model[0].weight.grad is None
    assert model[2].weight.grad.dtype == torch.bfloat16
    assert torch.equal(unused.grad, torch.zeros(2))


def test_zero_gradient_is_no_division_by_zero() -> None:
    weight = torch.ones(2, requires_grad=True)
    private = PrivateGradient([weight], 1.0, 0.0, torch.Generator())
    assert private.add((weight * 0).sum()) == 0
    private.finish(1.0)
    assert torch.equal(weight.grad, torch.zeros(2))


def test_gradient_that_is_not_finite_is_an_error() -> None:
    weight = torch.ones(2, requires_grad=True)
    private = PrivateGradient([weight], 1.0, 0.0, torch.Generator())
    with pytest.raises(ValueError, match="loss: expected one with a finite gradient; its norm is nan"):
        private.add((weight * math.nan).sum())
    private.add(weight.sum())
    private.finish(1.0)
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("max_norm", "noise", "message"),
    [
        (0.0, 1.0, "max_norm: expected a number above 0"),
        (math.nan, 1.0, "max_norm: expected a number above 0"),
        (1.0, -1.0, "noise_multiplier: expected a finite number at least 0"),
        (math.inf, 1.0, "max_norm: expected a finite number"),
    ],
)
def test_wrong_settings(max_norm: float, noise: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrivateGradient([torch.ones(1, requires_grad=True)], max_norm, noise, torch.Generator())
    with pytest.raises(ValueError, match="parameters: expected at least one that requires a gradient"):
        PrivateGradient([torch.ones(1)], 1.0, 1.0, torch.Generator())


@pytest.mark.parametrize(("sigma", "rate"), [(1.1, 0.01), (0.7, 0.2), (3.0, 0.5), (2.0, 1.0)])
@pytest.mark.parametrize("order", [2, 5, 17])
def test_renyi_divergence_is_its_integral(sigma: float, rate: float, order: int) -> None:
    """log E_{x ~ N(0, sigma^2)} [ ((1 - q) + q N(x; 1, sigma^2) / N(x; 0, sigma^2))^alpha ] / (alpha - 1)."""
    x = np.linspace(-12 * sigma, order + 12 * sigma, 400_001)
    log_ratio = np.logaddexp(
        np.log1p(-rate) if rate < 1 else -np.inf, np.log(rate) + (2 * x - 1) / (2 * sigma**2)
    )
    log_terms = order * log_ratio - x**2 / (2 * sigma**2) - np.log(sigma * np.sqrt(2 * np.pi))
    expected = np.log(np.exp(log_terms).sum() * (x[1] - x[0])) / (order - 1)
    assert renyi(order, sigma, rate) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta", "opacus"),
    [
        (1.1, 256 / 60_000, 14_040, 1e-5, 2.594363354953112),
        (1.0, 0.01, 1_000, 1e-5, 2.1013652716430564),
        (0.8, 0.02, 500, 1e-6, 6.164547278809111),
        (2.0, 0.1, 200, 1e-5, 3.6797458455819227),
        (1.0, 1.0, 1, 1e-5, 4.728507067217623),
        (0.5, 0.001, 10_000, 1e-6, 7.5696598696317645),
    ],
)
def test_epsilon_is_that_of_opacus(
    sigma: float, rate: float, steps: int, delta: float, opacus: float
) -> None:
    """Opacus 1.6.0 with its own orders, fractional ones among them: integers alone are a little looser."""
    assert opacus * (1 - 1e-9) <= epsilon(sigma, rate, steps, delta) < 1.006 * opacus


def test_epsilon_at_the_ends() -> None:
    assert epsilon(1.0, 0.01, 0, 1e-5) == 0.0
    assert epsilon(0.0, 0.01, 1, 1e-5) == math.inf
    assert epsilon(1e5, 0.01, 1, 1e-5) < 0.02


def test_noise_for_a_target_is_the_least() -> None:
    sigma = noise_multiplier_for(2.0, 0.01, 1_000, 1e-5)
    assert epsilon(sigma, 0.01, 1_000, 1e-5) <= 2.0 < epsilon(0.998 * sigma, 0.01, 1_000, 1e-5)
    with pytest.raises(ValueError, match="target_epsilon: expected at least"):
        noise_multiplier_for(1e-4, 0.01, 1_000, 1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((-1.0, 0.1, 1, 1e-5), "noise_multiplier: expected a number at least 0"),
        ((1.0, 0.0, 1, 1e-5), "sample_rate: expected a number above 0, at most 1"),
        ((1.0, 0.1, -1, 1e-5), "steps: expected a number at least 0"),
        ((1.0, 0.1, 1, 1.0), "delta: expected a number between 0 and 1"),
    ],
)
def test_wrong_numbers(given: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        epsilon(*given)

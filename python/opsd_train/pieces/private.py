"""Differentially private steps: per-example clipping and Gaussian noise, and the epsilon that they cost.

DP-OPD (arXiv 2604.04461) is DP-SGD on distillation losses: the teacher is public, the prompts are private. An
example is a prompt with its rollout. Its gradient depends on no other example as long as its loss does not,
so a loss has to be the example's own mean: a normalisation over the batch breaks the guarantee.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 384, 512)


class NotFinite(ValueError):
    """An example's gradient is not finite, so that no factor would bound it."""


class PrivateGradient:
    """The gradient of a step: sum of clipped gradients, plus noise, over the batch size.

        private = PrivateGradient(model.parameters(), max_norm=1.0, noise_multiplier=0.8, generator=generator)
        for example in batch:
            private.add(loss_of(example))
        private.finish(expected_batch_size)
        optimizer.step()

    Args:
        parameters: those that require a gradient are trained, the others are left alone.
        max_norm: C, the bound of an example's gradient in the norm over all parameters; inf for none.
        noise_multiplier: sigma; the noise has standard deviation sigma C in every coordinate of the sum.
        generator: on the parameters' device, for the noise. Whoever knows its seed can subtract the noise.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        max_norm: float,
        noise_multiplier: float,
        generator: torch.Generator,
    ) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("parameters: expected at least one that requires a gradient; got none")
        if not max_norm > 0:
            raise ValueError(f"max_norm: expected a number above 0; got {max_norm}")
        if not 0 <= noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier: expected a finite number at least 0; got {noise_multiplier}")
        if noise_multiplier > 0 and math.isinf(max_norm):
            raise ValueError("max_norm: expected a finite number, since the noise is in proportion; got inf")
        self.max_norm, self.noise_multiplier = max_norm, noise_multiplier
        self.generator = generator
        self._sums = [torch.zeros_like(one, dtype=_sum_dtype(one)) for one in self.parameters]

    def add(self, loss: Tensor) -> float:
        """Add the clipped gradient of one example's loss; returns its norm before clipping.

        Raises NotFinite, and adds nothing, for a gradient that is not finite: no factor would bound it.
        """
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = [(total, one) for total, one in zip(self._sums, found, strict=True) if one is not None]
        norms = [torch.linalg.vector_norm(one, dtype=total.dtype).double() for total, one in pairs]
        norm = torch.stack(norms).norm().item() if norms else 0.0
        if not math.isfinite(norm):
            raise NotFinite(f"loss: expected one with a finite gradient; its norm is {norm}")
        factor = min(1.0, self.max_norm / norm) if norm > 0 else 1.0
        for total, one in pairs:
            total.add_(one.to(total.dtype), alpha=factor)
        return norm

    def finish(self, batch_size: float) -> None:
        """Write the noisy mean into `.grad` of every parameter, and start anew.

        `batch_size` is the expected one, which does not depend on the examples drawn: of Poisson sampling the
        sampling rate times the number of examples. A step without examples is noise alone.
        """
        if not batch_size > 0:
            raise ValueError(f"batch_size: expected a number above 0; got {batch_size}")
        for parameter, total in zip(self.parameters, self._sums, strict=True):
            if self.noise_multiplier > 0:
                noise = torch.randn(
                    total.shape, dtype=total.dtype, device=total.device, generator=self.generator
                )
                total.add_(noise, alpha=self.noise_multiplier * self.max_norm)
            parameter.grad = (total / batch_size).to(parameter.dtype)
            total.zero_()


def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Epsilon of (epsilon, delta)-differential privacy after `steps` steps, by Renyi differential privacy.

    Assumes that every step draws each example on its own with probability `sample_rate` (Poisson sampling),
    and neighbours that differ by one example more or less. Fixed or shuffled batches are not covered by it.
    The best bound over the orders of `ORDERS`, converted by arXiv 2004.00010, proposition 12.

    Returns 0 without steps, and inf without noise.
    """
    _in_range("noise_multiplier", noise_multiplier, noise_multiplier >= 0, "at least 0")
    _in_range("sample_rate", sample_rate, 0 < sample_rate <= 1, "above 0, at most 1")
    _in_range("steps", steps, steps >= 0, "at least 0")
    _in_range("delta", delta, 0 < delta < 1, "between 0 and 1")
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    bounds = [
        steps * renyi(order, noise_multiplier, sample_rate)
        + math.log1p(-1 / order)
        - math.log(delta * order) / (order - 1)
        for order in ORDERS
    ]
    return max(min(bounds), 0.0)


def renyi(order: int, noise_multiplier: float, sample_rate: float) -> float:
    """Renyi divergence of an integer order alpha >= 2 of one step: the sampled Gaussian mechanism.

    log( sum_k C(alpha, k) (1 - q)^(alpha - k) q^k exp((k^2 - k) / (2 sigma^2)) ) / (alpha - 1), k = 0..alpha
    (arXiv 1908.10530, section 3.3); alpha / (2 sigma^2) where q = 1. Summed in the log domain.
    """
    if sample_rate == 1:
        return order / (2 * noise_multiplier**2)
    logs = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-sample_rate)
        + k * math.log(sample_rate)
        + (k * k - k) / (2 * noise_multiplier**2)
        for k in range(order + 1)
    ]
    largest = max(logs)
    return (largest + math.log(math.fsum(math.exp(one - largest) for one in logs))) / (order - 1)


def noise_multiplier_for(target_epsilon: float, sample_rate: float, steps: int, delta: float) -> float:
    """The least sigma, to a part in a thousand, that keeps `epsilon` at or below the target.

    Raises ValueError for a target that no noise up to 10^6 reaches: the conversion to delta alone costs more.
    """
    _in_range("target_epsilon", target_epsilon, target_epsilon > 0, "above 0")
    low, high = 0.0, 1.0
    while epsilon(high, sample_rate, steps, delta) > target_epsilon:
        low, high = high, 2 * high
        if high > 1e6:
            least = epsilon(high, sample_rate, steps, delta)
            raise ValueError(
                f"target_epsilon: expected at least {least:.4g} with delta {delta}; got {target_epsilon}"
            )
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if epsilon(middle, sample_rate, steps, delta) > target_epsilon:
            low = middle
        else:
            high = middle
    return high


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _in_range(name: str, value: float, kept: bool, words: str) -> None:
    if not kept:
        raise ValueError(f"{name}: expected a number {words}; got {value}")

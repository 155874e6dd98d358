"""How much of the solution the teacher sees, learned along the way (ATESD, 2605.11458).

The revealed share alpha is drawn from a Beta distribution that a small network chooses from the state of
training, and is held for a window of optimizer steps. The window's reward trains the network by REINFORCE.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

EXPOSURE_FILE = "exposure.json"
FEATURES = 5


@dataclass(frozen=True)
class ExposureSettings:
    """The constants of the controller.

    Args:
        hold: optimizer steps for which a share is held, H.
        horizon: optimizer steps of the whole run; the state knows how far it is.
        discount: of a window's later steps, gamma.
        reference: factor of the reference's log-probability in the reward, lambda.
        penalty: factor of the penalty on an entropy of the Beta distribution above `target_entropy`, c.
        target_entropy: in nats; the uniform distribution has 0, sharper ones less.
        learning_rate: of plain gradient steps.
        width: hidden units of the network.
        seed: of its weights and of the draws.
    """

    hold: int = 5
    horizon: int = 100
    discount: float = 0.9
    reference: float = 0.1
    penalty: float = 0.01
    target_entropy: float = -0.5
    learning_rate: float = 0.05
    width: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hold", "horizon", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1; got {getattr(self, name)}")
        if not 0 < self.discount <= 1:
            raise ValueError(f"discount: expected a number above 0 and at most 1; got {self.discount}")


class Exposure:
    """The controller; a function of its settings and of what it observed.

    `alpha` is the share to show in the coming step. The state of training that the network sees is the share
    of steps done, the last loss, by how much it fell over the last window, the last log-probability of the
    reference, and the last alpha.
    """

    def __init__(self, settings: ExposureSettings) -> None:
        self.settings = settings
        self.random = np.random.default_rng(settings.seed)
        sizes = [(settings.width, FEATURES), (settings.width,), (2, settings.width), (2,)]
        self.weights = [
            torch.from_numpy(self.random.normal(0, 1 / math.sqrt(size[-1]), size) * (len(size) == 2))
            for size in sizes
        ]
        self.steps = 0
        self.state = [0.0] * FEATURES
        self.losses: list[float] = []  # of the window, led by the last one before it
        self.references: list[float] = []
        self.rewards = [0.0, 0.0, 0.0]  # how many, their sum, the sum of their squares
        self.alpha = self._draw()

    def observe(self, loss: float, reference_logprob: float = 0.0) -> None:
        """Take note of a step: its mean loss, and the teacher's mean log-prob of the reference's tokens.

        At the end of a window the network takes a gradient step and the next share is drawn.
        """
        for name, value in (("loss", loss), ("reference_logprob", reference_logprob)):
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number; got {value}")
        self.steps += 1
        self.losses.append(loss)
        self.references.append(reference_logprob)
        if len(self.references) < self.settings.hold:
            return
        # The first window has no loss before it and is rewarded from its second step on.
        self._learn(window_reward(self.losses, self.references, self.settings))
        done = min(self.steps / self.settings.horizon, 1.0)
        fell = self.losses[0] - loss
        self.state = [done, loss, fell, reference_logprob, self.alpha]
        self.losses, self.references = [loss], []
        self.alpha = self._draw()

    def beta(self) -> tuple[Tensor, Tensor]:
        """`(a, b) = 1 + softplus(f(state))`, both above 1: the density has one peak, inside (0, 1)."""
        return beta_parameters(self.weights, torch.tensor(self.state, dtype=torch.float64))

    def save(self, checkpoint: str | os.PathLike[str]) -> None:
        """Write everything into a checkpoint's folder, as JSON."""
        held = {
            "settings": asdict(self.settings),
            "weights": [weight.tolist() for weight in self.weights],
            "random": self.random.bit_generator.state,
            **{name: getattr(self, name) for name in PLAIN},
        }
        (Path(checkpoint) / EXPOSURE_FILE).write_text(json.dumps(held), encoding="utf-8")

    def load(self, checkpoint: str | os.PathLike[str]) -> None:
        """Go on from what `save` wrote; ValueError if there is nothing, or of other settings."""
        path = Path(checkpoint) / EXPOSURE_FILE
        if not path.is_file():
            raise ValueError(f"resume_from_checkpoint: expected {EXPOSURE_FILE} in {checkpoint}; got none")
        held: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if held["settings"] != asdict(self.settings):
            raise ValueError(
                f"resume_from_checkpoint: expected {path} to be of the same settings; got {held['settings']}"
            )
        self.weights = [torch.tensor(weight, dtype=torch.float64) for weight in held["weights"]]
        self.random.bit_generator.state = held["random"]
        for name in PLAIN:
            setattr(self, name, held[name])

    def _draw(self) -> float:
        a, b = self.beta()
        return float(self.random.beta(a.item(), b.item()))

    def _learn(self, reward: float) -> None:
        """One gradient step for the share that was held, with the reward normalised by those before it."""
        count, total, squares = self.rewards
        mean = total / count if count else reward
        deviation = math.sqrt(max(squares / count - mean**2, 0.0)) if count else 0.0
        advantage = (reward - mean) / max(deviation, 1e-8) if deviation > 0 else 0.0
        self.rewards = [count + 1, total + reward, squares + reward**2]
        weights = [weight.requires_grad_() for weight in self.weights]
        state = torch.tensor(self.state, dtype=torch.float64)
        loss = controller_loss(weights, state, self.alpha, advantage, self.settings)
        moves = torch.autograd.grad(loss, weights)
        rate = self.settings.learning_rate
        self.weights = [(w - rate * move).detach() for w, move in zip(weights, moves, strict=True)]


PLAIN = ("steps", "state", "losses", "references", "rewards", "alpha")


def window_reward(losses: list[float], references: list[float], settings: ExposureSettings) -> float:
    """`sum_i g^(i-1) max(0, loss_(i-1) - loss_i) + lambda sum_i g^(i-1) reference_i` over a window's steps.

    Args:
        losses: of the steps, led by the one before them if there was one.
        references: log-probabilities of the steps.
        settings: gamma and lambda.
    """
    drops = [max(0.0, before - after) for before, after in pairwise(losses)]
    late = len(references) - len(drops)  # the first step of the very first window has no drop
    progress = sum(settings.discount ** (i + late) * drop for i, drop in enumerate(drops))
    truth = sum(settings.discount**i * value for i, value in enumerate(references))
    return progress + settings.reference * truth


def beta_parameters(weights: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """The Beta distribution's (a, b), fp64 scalars, of a state [FEATURES]."""
    inner, inner_bias, outer, outer_bias = weights
    raw = outer @ torch.tanh(inner @ state + inner_bias) + outer_bias
    a, b = 1 + F.softplus(raw)
    return a, b


def controller_loss(
    weights: list[Tensor], state: Tensor, alpha: float, advantage: float, settings: ExposureSettings
) -> Tensor:
    """`-A log Beta(alpha; a, b) + c max(0, H(a, b) - H_target)^2`."""
    drawn = torch.distributions.Beta(*beta_parameters(weights, state))
    # A share that was rounded to an end of the interval has no density there.
    inside = torch.tensor(min(max(alpha, 1e-9), 1 - 1e-9), dtype=torch.float64)
    excess = (drawn.entropy() - settings.target_entropy).clamp(min=0)
    return -advantage * drawn.log_prob(inside) + settings.penalty * excess**2

"""From per-prompt gradients to alignment scores with intervals; see `diagnose.py` for what they mean."""

import math
import statistics
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from opsd_train.evaluation.passk import Interval, bootstrap

GROUPS = 10  # of prompts, for the jackknife
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % points, by freedom


class Alignment(TypedDict):
    """How one candidate is aligned; cosines in [-1, 1].

    `overall` is that of the gradients summed over prompts, with a jackknife interval over groups of prompts;
    None with fewer than two prompts. `mean` is the mean over prompts of `prompts`, None for a prompt whose
    rollouts all have the same reward and say nothing. `right` and `wrong` are overall, of the loss on the
    rollouts with a reward above and at or below their prompt's mean.
    """

    candidate: str
    overall: Interval | None
    mean: Interval | None
    right: float | None
    wrong: float | None
    prompts: list[float | None]


class Diagnosis(TypedDict):
    """All candidates on the same rollouts; `ceiling` is None where the halves do not agree at all."""

    reward: float
    informative: int
    ceiling: float | None
    candidates: list[Alignment]


class Sums:
    """Gradients summed over groups of prompts: 10 fp32 vectors per direction, on the CPU.

    Args:
        names: of the candidates.
        prompts: how many there will be.
        size: entries of a gradient.
    """

    def __init__(self, names: Sequence[str], prompts: int, size: int) -> None:
        self.names, self.groups = list(names), min(GROUPS, prompts)
        self._halves = torch.zeros(2, self.groups, size)
        self._parts = torch.zeros(len(self.names), 2, self.groups, size)
        self._cosines: list[list[float | None]] = [[] for _ in self.names]
        self._rewards: list[Tensor] = []

    def add_ideal(self, prompt: int, halves: Tensor, reward: Tensor) -> None:
        """The two halves `[2, size]` of a prompt's ideal gradient, and the rewards `[n]` they are made of."""
        self._halves[:, prompt % self.groups] += halves
        self._rewards.append(reward)

    def add_direction(self, candidate: int, prompt: int, parts: Tensor, cosine: float | None) -> None:
        """A candidate's direction on right and on wrong rollouts `[2, size]`, and the cosine of their sum."""
        self._parts[candidate, :, prompt % self.groups] += parts
        self._cosines[candidate].append(cosine)

    def diagnosis(self) -> Diagnosis:
        """The scores of all candidates."""
        return Diagnosis(
            reward=statistics.fmean(reward.mean().item() for reward in self._rewards),
            informative=sum(bool((reward != reward[0]).any()) for reward in self._rewards),
            ceiling=_ceiling(self._halves.sum(1)),
            candidates=[self._alignment(at) for at in range(len(self.names))],
        )

    def _alignment(self, at: int) -> Alignment:
        ideal, parts = self._halves.sum(0), self._parts[at]
        known = [value for value in self._cosines[at] if value is not None]
        right, wrong = (cosine(ideal.sum(0), part.sum(0)) for part in parts)
        return Alignment(
            candidate=self.names[at],
            overall=jackknife(ideal, parts.sum(0)),
            mean=bootstrap(known) if known else None,
            right=right,
            wrong=wrong,
            prompts=self._cosines[at],
        )


def cosine(one: Tensor, other: Tensor) -> float | None:
    """Cosine of two vectors, in fp64; None where one of them is zero."""
    a, b = one.double(), other.double()
    norms = (a.norm() * b.norm()).item()
    return (a @ b).item() / norms if norms > 0 else None


def jackknife(ideal: Tensor, direction: Tensor) -> Interval | None:
    """Cosine of the sums over the groups `[G, size]`, with the interval of the jackknife over groups.

    value +- t sqrt( (G - 1) / G sum_g (c_g - mean c)^2 ), c_g the cosine without group g, t Student's with
    G - 1 degrees of freedom; cut off at -1 and 1. None if the cosine is undefined, or G < 2.
    """
    groups = len(ideal)
    value = cosine(ideal.sum(0), direction.sum(0))
    without = [cosine(ideal.sum(0) - ideal[g], direction.sum(0) - direction[g]) for g in range(groups)]
    known = [one for one in without if one is not None]
    if groups < 2 or value is None or len(known) < groups:
        return None
    centre = statistics.fmean(known)
    error = math.sqrt((groups - 1) / groups * sum((one - centre) ** 2 for one in known))
    half = STUDENT_T[groups - 2] * error
    return Interval(value=value, low=max(value - half, -1.0), high=min(value + half, 1.0))


def _ceiling(halves: Tensor) -> float | None:
    """Cosine of the ideal's estimate and the ideal itself, by Spearman and Brown: sqrt(2 r / (1 + r)).

    r is the cosine of the two halves `[2, size]`; None unless it is above 0.
    """
    agreement = cosine(halves[0], halves[1])
    if agreement is None or agreement <= 0:
        return None
    return math.sqrt(2 * agreement / (1 + agreement))

"""Contenders that do something wrong, and groups of results that nobody measured."""

from collections.abc import Callable
from dataclasses import replace

import torch

from bench.cases import Case, Inputs
from bench.contenders import CONTENDERS, EAGER, FLOOR, Contender
from bench.measure import Group, Result
from bench.timing import Drift

TINY = Case(rows=32, vocab=256, hidden=16, objective="forward_kl")
DATA = {"gap": 1.0, "logit_std": 7.5, "student_entropy": 1.0, "teacher_entropy": 1.0}


def named(name: str) -> Contender:
    """The contender of that name."""
    (found,) = (one for one in CONTENDERS if one.name == name)
    return found


YARDSTICKS = [named(FLOOR), named(EAGER)]


def spoiled(
    name: str, spoil: Callable[[torch.Tensor, Inputs], torch.Tensor], *, ours: bool = True
) -> Contender:
    """Eager PyTorch whose value and gradients go through `spoil`, which returns the value."""

    def function(inputs: Inputs, case: Case) -> torch.Tensor:
        return spoil(named(EAGER).function(inputs, case), inputs)

    return Contender(name, function, ours=ours)


def wrong_value(value: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """A sum instead of a mean, in the value alone."""
    return value * inputs.count


def wrong_gradient(value: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """dW is too long by a tenth of a thousandth: in fp32 that is far from rounding."""
    assert inputs.head.grad is not None
    inputs.head.grad *= 1.0001
    return value


def no_gradient(value: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """dW is forgotten."""
    inputs.head.grad = None
    return value


def without_mask(inputs: Inputs, case: Case) -> torch.Tensor:
    """Counts masked rows, too."""
    every = replace(inputs, mask=None)
    return named(EAGER).function(every, replace(case, masked=0.0))


def fabricated(case: Case = TINY, *, drift: float = 0.0, rejected: bool = False) -> Group:
    """Results with made-up numbers."""
    seconds: dict[str, list[float]] = {FLOOR: [1.0, 1.1], EAGER: [2.0, 2.2], "opsd_kernels": [1.5, 1.6]}
    results = []
    for index, (name, times) in enumerate(seconds.items()):
        result = Result(name, case.objective, seconds=times, extra_bytes=(index + 1) * 2**20)
        if name != FLOOR:
            result.value_error, result.dh_error, result.dh_cosine = 1e-6, 1e-5 / index, 1e-10
            result.dw_error, result.dw_cosine = 1e-5 / index, 1e-10
        results.append(result)
    group = Group(case, results, {"some peer": "does not compute it"}, DATA, drift=Drift(1.0, 1.0 + drift))
    group.rejected = rejected
    return group

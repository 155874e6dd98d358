"""The lines of `divergences.def` as functions of tensors, with the per-entry clip."""

from collections.abc import Callable
from functools import cache, cached_property

import torch

from opsd_kernels.divergences import compile_expression
from opsd_kernels.objectives import Objective


def times(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """p x, and 0 where p = 0 even if x is infinite (0 log 0 = 0)."""
    return torch.where(p == 0, 0.0, p * x)


def kl_term(p: torch.Tensor, q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """q - p - p x for x = log(q / p), never negative.

    p expm1(x) keeps the digits that q - p loses where p and q are close; q - p holds where expm1 overflows.
    """
    growth = torch.where(x < 1, torch.expm1(x).mul_(p), q - p)
    return growth.sub_(times(p, x))


@cache
def _compiled(source: str) -> Callable[..., torch.Tensor]:
    return compile_expression(source, {"times": times, "kl_term": kl_term})


class Entries:
    """Per-entry quantities of a block of rows under an objective, each `[R, V]`, computed when first read.

    Args:
        ls: log s.
        lt: log t.
        objective: the token loss.
    """

    def __init__(self, ls: torch.Tensor, lt: torch.Tensor, objective: Objective) -> None:
        self.objective = objective
        self.divergence = objective.term
        self.s, t = ls.exp(), lt.exp()
        # A column that both exclude would give -inf - -inf; with d = 0 and s = t = 0 its every term is 0.
        d = torch.where(ls == lt, 0.0, ls - lt)
        mixed = self.divergence.uses_mixture
        m, rs, rt = _mixture(self.s, t, d, objective.beta) if mixed else (None, None, None)
        self._letters = (self.s, t, m, d, rs, rt, objective.beta)

    @cached_property
    def value(self) -> torch.Tensor:
        """Terms in the non-negative form, clipped; their sum is the token's loss."""
        tau = self.objective.entry_clip
        if tau is None:
            return self._unclipped
        return torch.where(self.signed_term > tau, self._slack + tau, self._unclipped)

    @cached_property
    def weight(self) -> torch.Tensor:
        """a_v = dL/dlog s_v, clipped."""
        weight = self._evaluate(self.divergence.weight)
        tau = self.objective.entry_clip
        if tau is None:
            return weight
        kept = 0.0 if self.objective.clip_mode == "zero" else weight * (tau / self.signed_term)
        return torch.where(self.signed_term > tau, kept, weight)

    @cached_property
    def signed_term(self) -> torch.Tensor:
        """The published signed term l_v, which the clip compares with tau."""
        return self._unclipped - self._slack

    @cached_property
    def _unclipped(self) -> torch.Tensor:
        return self._evaluate(self.divergence.value)

    @cached_property
    def _slack(self) -> torch.Tensor:
        return self._evaluate(self.divergence.slack)

    def _evaluate(self, source: str) -> torch.Tensor:
        return _compiled(source)(*self._letters)


def _mixture(s: torch.Tensor, t: torch.Tensor, d: torch.Tensor, beta: float) -> tuple[torch.Tensor, ...]:
    """m = beta t + (1 - beta) s, log m - log s and log m - log t.

    Relative to the larger of the two, log m is log1p(share * expm1(-|d|)): exact near d = 0, never an
    overflow, and right where one of them is 0.
    """
    student_larger, gap = d > 0, d.abs()
    share = torch.where(student_larger, d.new_tensor(beta), d.new_tensor(1 - beta))
    to_larger = torch.log1p(torch.expm1(-gap).mul_(share))
    to_smaller = to_larger + gap
    rs = torch.where(student_larger, to_larger, to_smaller)
    rt = torch.where(student_larger, to_smaller, to_larger)
    return beta * t + (1 - beta) * s, rs, rt

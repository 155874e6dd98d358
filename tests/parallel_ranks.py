"""What the checks of vocabulary-parallel heads share: a rank, its slices, and the rule they are held to."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opsd_kernels import Hidden, Logits, loss, parallel
from opsd_kernels.testing import COSINE, Case, Outcome, assert_accurate, evaluate, upstream_of

Check = Callable[["Ranks"], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Makes a function one that every group of ranks runs."""
    CHECKS[function.__name__] = function
    return function


@dataclass(frozen=True)
class Ranks:
    """This process among those that hold a vocabulary."""

    rank: int
    world: int
    group: dist.ProcessGroup

    def cuts(self, vocab: int) -> list[int]:
        """Where unequal slices begin and end."""
        return [
            0,
            *[vocab * (2 * rank + 1) // (2 * self.world) - rank for rank in range(1, self.world)],
            vocab,
        ]

    def sliced(self, source: Any, cuts: Sequence[int] | None = None) -> Any:
        """The source over this rank's columns; gradients flow to the whole one."""
        cuts = self.cuts(source.vocab) if cuts is None else cuts
        mine = slice(cuts[self.rank], cuts[self.rank + 1])
        if isinstance(source, Logits):
            return Logits(source.z[..., mine])
        bias = None if source.bias is None else source.bias[mine]
        return replace(source, weight=source.weight[mine], bias=bias)

    def loss(self, student: Any, teacher: Any, cuts: Sequence[int] | None = None, **options: Any) -> Any:
        """`parallel.loss` of whole sources, each rank over its slice."""
        s, t = (self.sliced(x, cuts) for x in (student, teacher))
        return parallel.loss(s, t, group=self.group, **options)

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """`[R, ...]` the tensor of every rank."""
        everyone = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(everyone, x.contiguous(), group=self.group)
        return torch.stack(everyone)

    def assert_same(self, name: str, x: torch.Tensor) -> None:
        """Same bits on every rank."""
        everyone = self.gathered(x.detach())
        assert torch.equal(everyone, everyone[:1].expand_as(everyone)), f"{name}: differs between ranks"

    def summed(self, outcome: Outcome) -> Outcome:
        """Gradients of the slices put together; those of hidden states are the same everywhere."""
        gradients = dict(outcome.gradients)
        for name, gradient in gradients.items():
            if name == "hidden":
                self.assert_same("dhidden", gradient)
            else:
                gradients[name] = self.gathered(gradient).sum(0)
        self.assert_same("loss", outcome.loss)
        return Outcome(outcome.loss, gradients)

    def assert_as_single(
        self, case: Case, *, cuts: Sequence[int] | None = None, cosine: float = COSINE
    ) -> Outcome:
        """At most twice the error that one process makes, against the definition in fp64."""
        actual = self.summed(evaluate(partial(self.loss, cuts=cuts), case))
        upstream = upstream_of(actual.loss)
        single = evaluate(partial(loss, backend="torch"), case, upstream)
        expected = evaluate(partial(loss, backend="reference"), case.to(torch.float64), upstream)
        yardstick = single.loss
        if actual.loss.dim() == 0:
            yardstick = expected.loss + _sum_of_token_errors(case)
        assert_accurate("loss", actual.loss, expected.loss, yardstick)
        for name, gradient in expected.gradients.items():
            found = actual.gradients[name]
            assert_accurate(f"d{name}", found, gradient, single.gradients[name], cosine=cosine)
        return actual

    def refuses(self, match: str, function: Callable[[], Any]) -> None:
        """A ValueError on this rank (and, as every rank runs this, on all)."""
        with pytest.raises(ValueError, match=re.escape(match)):
            function()


def leaves(source: Hidden) -> Hidden:
    """The source over tensors that require a gradient."""
    return source.with_tensors([x.detach().clone().requires_grad_() for x in source.tensors])


def _sum_of_token_errors(case: Case) -> torch.Tensor:
    """Of one process: the errors of the tokens may cancel in a sum, which is luck and no yardstick."""
    tokens, double = (x.having(reduction="none", denominator=None) for x in (case, case.to(torch.float64)))
    with torch.no_grad():
        single = loss(tokens.student, tokens.teacher, **tokens.options)
        truth = loss(double.student, double.teacher, backend="reference", **double.options)
    error = (single - truth).abs().sum()
    if case.options.get("reduction", "mean") == "sum":
        return error
    given, mask = case.options.get("denominator"), case.options.get("mask")
    count = truth.numel() if mask is None else mask.sum()
    return error / (count if given is None else given)

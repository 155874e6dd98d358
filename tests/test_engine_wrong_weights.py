"""What a function of the token's statistics may return as its weight, and what is left of it afterwards."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opsd_kernels import Logits, TokenStats, loss, ops
from opsd_kernels.objectives import Objective
from opsd_kernels.recipes import Entropy, Recipe, Term
from opsd_kernels.testing import hidden_case, hidden_sources
from wrong_calls import raises

LIVE = torch.tensor([True, True, False, True, True, True])
IDS = torch.zeros(6, dtype=torch.int64)
HOW: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "statistics": {"backend": "reference"},
    "recipe": {"objective": Recipe((Term(Objective("forward_kl")), Term(Entropy(), 0.1)))},
}


def _spoilt(value: float) -> Callable[[TokenStats], Tensor]:
    """A weight that is not finite at one of the tokens that count."""
    return lambda s: torch.where(s.forward_kl == s.forward_kl.max(), value, s.jsd)


WRONG: dict[str, tuple[Callable[[TokenStats], Any], str]] = {
    "NaN": (_spoilt(torch.nan), "nan"),
    "inf": (_spoilt(torch.inf), "inf"),
    "-inf": (_spoilt(-torch.inf), "-inf"),
    "bool": (lambda s: s.jsd > 0, "torch.bool"),
    "integer": (lambda s: s.top1_agreement.long(), "torch.int64"),
    "gradient": (lambda s: torch.ones(s.jsd.shape, requires_grad=True), "requires_grad=True"),
    "sparse": (lambda s: s.jsd.to_sparse(), "torch.sparse_coo"),
    "device": (lambda s: s.jsd.to("meta"), "meta"),
    "column": (lambda s: s.jsd[..., None], "1)"),
    "number": (lambda s: 0.5, "float"),
}


def _call(function: Callable[[TokenStats], Any], trained: bool, **options: Any) -> Tensor:
    student, teacher = hidden_sources(hidden_case(6, 50, 8).to(torch.float32))
    student = replace(student, hidden=student.hidden.detach().requires_grad_(trained))
    return loss(student, teacher, token_weight=function, token_ids=IDS, **options)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str, how: str, trained: bool) -> None:
    function, got = WRONG[name]
    raises(lambda: _call(function, trained, **HOW[how]), ("token_weight", got))


@pytest.mark.parametrize("how", HOW)
def test_a_dead_row_may_have_any_weight(how: str) -> None:
    """Its statistics are 0, so that a quotient of them is NaN there."""
    found = _call(lambda s: s.jsd / s.jsd, True, mask=LIVE, **HOW[how])
    torch.testing.assert_close(found, _call(lambda s: torch.ones_like(s.jsd), True, mask=LIVE, **HOW[how]))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("right", [True, False])
def test_no_function_is_held_after_the_call(how: str, right: bool) -> None:
    if right:
        _call(lambda s: s.jsd, True, **HOW[how])
    else:
        with pytest.raises(ZeroDivisionError):
            _call(lambda s: 1 / 0, True, **HOW[how])
    assert ops._weighers == {}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("how", ["mask", "rows", "all"])
def test_a_tensor_of_weights_is_finite_where_tokens_count(how: str, reduction: str, value: float) -> None:
    z = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    live = torch.tensor([True, True, False, True])
    which = {"mask": {"mask": live}, "rows": {"rows": live.nonzero().flatten()}, "all": {}}[how]
    weights = torch.ones(4)
    weights[1] = value
    with pytest.raises(ValueError, match=r"^token_weight: expected finite factors.*got (nan|inf)"):
        loss(Logits(z), Logits(z.flip(0)), token_weight=weights, reduction=reduction, **which)
    if how != "all":
        expected = loss(Logits(z), Logits(z.flip(0)), token_weight=torch.ones(4), reduction="sum", **which)
        weights = torch.where(live, 1.0, value)
        actual = loss(Logits(z), Logits(z.flip(0)), token_weight=weights, reduction="sum", **which)
        assert actual.item() == expected.item()

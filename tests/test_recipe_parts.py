"""Recipes that are written wrongly are refused when they are written."""

from typing import Any

import pytest
import torch

from opsd_kernels import Entropy, Hidden, Objective, Recipe, Term, Weight, loss, methods
from opsd_train.studies.compare import parse_methods

FORWARD = Objective("forward_kl")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"loss": "forward_kl"},
            "loss: expected an Objective, an Estimator or Entropy\\(\\); got 'forward_kl'",
        ),
        ({"loss": None}, "loss: expected an Objective"),
        ({"loss": FORWARD, "coefficient": "1"}, "coefficient: expected a finite number; got '1'"),
        ({"loss": FORWARD, "coefficient": float("nan")}, "coefficient: expected a finite number; got nan"),
        ({"loss": FORWARD, "weights": Weight("tip")}, "weights: expected a tuple of Weight"),
        ({"loss": FORWARD, "weights": ("paced",)}, "weights: expected a tuple of Weight"),
        ({"loss": FORWARD, "teacher": None}, "teacher: expected one for a divergence; got None"),
        ({"loss": FORWARD, "normaliser": "token"}, "normaliser: expected one of tokens"),
    ],
)
def test_term(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Term(**given)


@pytest.mark.parametrize("terms", [(), Term(FORWARD), (FORWARD,), [Term(Entropy(), teacher=None)]])
def test_recipe(terms: Any) -> None:
    with pytest.raises(ValueError, match="terms: expected"):
        Recipe(terms)


def test_comparison_of_nothing() -> None:
    with pytest.raises(ValueError, match="methods: expected at least one name; got ''"):
        parse_methods("")


def test_the_definition_builds_targets_of_trained_heads() -> None:
    """A target's in-place arithmetic is on constants, though its sources share the student's parameter."""
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(*shape, generator=g) for shape in ((2, 3, 4), (9, 4)))
    w.requires_grad_()
    views = {f"view{i}": Hidden(torch.randn(2, 3, 4, generator=g), w) for i in (1, 2, 3)}
    found = []
    for backend in ("torch", "reference"):
        w.grad = None
        loss(Hidden(h, w), views, objective=methods.recipe("avsd"), backend=backend).backward()
        found.append(w.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)

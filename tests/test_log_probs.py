"""Log-probabilities that are none are refused: a loss of probabilities or logits is a wrong number."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from known_cases import FORWARD, HT, K1, LT, MASK, TOP, B, C, V, W, Y, a_student, run
from opsd_kernels import Hidden, Objective, Sampled, Support, TopK, loss, loss_and_stats, token_stats
from opsd_kernels.recipes import Estimator, Recipe, Term
from opsd_kernels.tokens import DATA
from wrong_calls import raises

GIVEN = Objective("forward_kl", support=Support(None, "given"))
AT_Y = LT.gather(-1, Y[..., None])[..., 0]
LOGITS = HT @ W.T
WRONG = {"probabilities": Tensor.exp, "positive": Tensor.neg, "shifted": lambda x: x + 12.0}
NAMES = [name for name in DATA if name.endswith(("logprob", "logprobs"))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wrong", WRONG)
def test_topk(wrong: str, dtype: torch.dtype) -> None:
    """Of probabilities the loss was 2.38 where 2.15 is right, of logits 6,522."""
    teacher = TopK(TOP.ids, WRONG[wrong](TOP.logprobs).to(dtype))
    for function in (loss, loss_and_stats, token_stats):
        raises(
            lambda f=function: f(a_student(), teacher, objective=GIVEN),
            ("teacher.logprobs", "log-probabilities", "got"),
        )
    several = Recipe((Term(FORWARD, 1.0, "a"), Term(GIVEN, 1.0, "b")))
    both = {"a": Hidden(HT, W), "b": teacher}
    raises(lambda: loss(a_student(), both, objective=several), ("teacher.sources[1].logprobs", "log-prob"))


def test_a_mass_above_one() -> None:
    """Log-probs of another normaliser: each is below 0, together they are more than a distribution."""
    teacher = TopK(TOP.ids, torch.full_like(TOP.logprobs, -0.2))
    raises(
        lambda: loss(a_student(), teacher, objective=GIVEN),
        ("teacher.logprobs", "log-probabilities", "mass", f"{TOP.ids.shape[-1] * math.exp(-0.2):.3g}"),
    )


@pytest.mark.parametrize("wrong", WRONG)
def test_sampled(wrong: str) -> None:
    teacher = Sampled(WRONG[wrong](AT_Y))
    raises(
        lambda: loss(a_student(), teacher, objective=K1, token_ids=Y),
        ("teacher.logprob", "log-probabilities", "got a value of"),
    )


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", NAMES)
def test_columns(name: str, wrong: str) -> None:
    column = WRONG[wrong](AT_Y)
    column = torch.stack((column - 20, column), -1) if DATA[name][0] == "teachers" else column
    recipe = Recipe((Term(Estimator("nll"), teacher=None),))
    raises(
        lambda: loss(a_student(), None, objective=recipe, token_ids=Y, data={name: column}),
        (f"data['{name}']", "log-probabilities", "got a value of"),
    )


CALLS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "topk": (lambda x: TopK(TOP.ids, x(TOP.logprobs)), GIVEN, {}),
    "sampled": (lambda x: Sampled(x(AT_Y)), K1, {"token_ids": Y}),
}


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_count_may_be_anything(name: str, rows: bool) -> None:
    teacher, objective, options = CALLS[name]

    def spoilt(x: Tensor) -> Tensor:
        dead = ~MASK if x.dim() == 2 else ~MASK[..., None]
        return x.masked_fill(dead, 7.0)

    live = {"rows": MASK.flatten().nonzero()[:, 0]} if rows else {"mask": MASK}
    found = run(teacher(spoilt), objective, **options, **live)
    expected = run(teacher(Tensor.clone), objective, **options, **live)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CALLS)
def test_a_rounding_of_zero_is_none(name: str) -> None:
    """A certain teacher may come out a few roundings above 0; entries of -1 are none."""
    teacher, objective, options = CALLS[name]

    def certain(x: Tensor) -> Tensor:
        sure = torch.full_like(x, -40.0)
        sure[..., :1] = 1e-6
        return sure if x.dim() == 3 else torch.full_like(x, 1e-6)

    assert run(teacher(certain), objective, **options) is not None
    absent = TopK(torch.full((B, C, 2), -1), torch.full((B, C, 2), 3.0))
    assert V > 2
    loss(a_student(), absent, objective=GIVEN)

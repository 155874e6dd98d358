"""Verifiers and diversity."""

import math
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from opsd_train.data.rows import Row
from opsd_train.evaluation.diversity import diversity
from opsd_train.evaluation.judge import same_mathematics
from opsd_train.evaluation.verify import Verifier
from opsd_train.reading.prompts import Prompt


def prompt(answer: str | None, **columns: Any) -> Prompt:
    user = ({"role": "user", "content": "?"},)
    return Prompt((1,), (1,), answer, "row 7", Row(user, user, answer, "row 7", "?", columns))


def share_of_answer(completion: str, answer: str | None) -> float:
    return len(completion) / len(answer or completion)


def by_tests(completion: str, answer: str | None, columns: Mapping[str, Any]) -> float:
    return sum(test in completion for test in columns["tests"]) / len(columns["tests"])


def broken(completion: str, answer: str | None) -> float:
    raise KeyError(completion)


def strange(completion: str, answer: str | None) -> Any:
    return {"nan": math.nan, "inf": math.inf, "none": None, "two": 2, "minus": -0.1, "word": "good"}[
        completion
    ]


NOT_A_FUNCTION = 3


def test_named_verifiers() -> None:
    prompts = [prompt("12"), prompt("12")]
    assert Verifier.named("exact").rewards([" 12\n", "so 12"], prompts) == [1.0, 0.0]
    assert Verifier.named("number").rewards(["so 12.0", "13"], prompts) == [1.0, 0.0]
    assert Verifier.named("math").rewards(["it is $\\frac{24}{2}$", "13"], prompts) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "answer", "same"),
    [
        ("so \\boxed{0.5}", "1/2", True),
        ("so \\boxed{0.5}", "\\frac{1}{2}", True),
        ("so 0.5", "It follows that $x = 3 - 5/2$, \\boxed{\\frac{1}{2}}", True),
        ("\\boxed{(1, 2)}", "(1,2)", True),
        ("\\boxed{(2, 1)}", "(1,2)", False),
        ("\\boxed{2\\sqrt{2}}", "\\sqrt{8}", True),
        ("\\boxed{\\{2, 1\\}}", "\\{1, 2\\}", True),
        ("no answer here", "3", False),
        ("", "3", False),
    ],
)
def test_mathematics_is_compared_by_value(completion: str, answer: str, same: bool) -> None:
    assert same_mathematics(completion, answer) is same
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(same_mathematics(completion, answer)))
    thread.start()
    thread.join()
    assert found == [same]


def test_users_function_by_import_path() -> None:
    halves = Verifier.named(f"{__name__}:share_of_answer")
    assert halves.rewards(["ab", "abcd"], [prompt("abcd")] * 2) == [0.5, 1.0]
    assert halves.rewards(["ab"], [prompt(None)]) == [1.0]
    assert Verifier.named(f"{__name__}:by_tests").rewards(["ab"], [prompt(None, tests=["a", "c"])]) == [0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "almost",
            "verifier: expected one of exact, number, math, reasoning_gym, or .*; got 'almost'",
        ),
        ("no_such_module:f", "verifier: expected a function at 'no_such_module:f', .* No module named"),
        (f"{__name__}:missing", "verifier: expected a function at .* has no attribute 'missing'"),
        (f"{__name__}:NOT_A_FUNCTION", "verifier: expected a function at .*; got a int"),
        (":f", "verifier: expected a function at ':f'"),
    ],
)
def test_unknown_verifier_is_an_error(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Verifier.named(name)


@pytest.mark.parametrize("completion", ["nan", "inf", "none", "two", "minus", "word"])
def test_reward_outside_0_to_1_names_the_row(completion: str) -> None:
    with pytest.raises(
        ValueError, match=r"row 7: expected a reward in \[0, 1\] from verifier .*strange'; got"
    ):
        Verifier.named(f"{__name__}:strange").rewards([completion], [prompt("3")])


def test_failing_verifier_names_the_row() -> None:
    with pytest.raises(
        ValueError, match=r"row 7: expected a reward from .*; it raised KeyError: 'x'"
    ) as caught:
        Verifier.named(f"{__name__}:broken").rewards(["x"], [prompt("3")])
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ValueError, match="row 7: expected an answer for verifier 'math'; got none"):
        Verifier.named("math").rewards(["x"], [prompt(None)])
    with pytest.raises(ValueError, match=r"row 7: .* expected mathematics"):
        Verifier.named("math").rewards(["x"], [prompt(" ")])


def test_diversity() -> None:
    found = diversity([["1", "1", "2", "3"], ["4", "4"]], [["a b a b", "a b"], ["x", "y"]])
    assert found["distinct"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found["entropy"] == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(4)) / 2)
    assert found["majority"] == pytest.approx((2 / 4 + 1) / 2)
    assert found["distinct_pairs"] == pytest.approx((2 / 4 + 0) / 2)
    with pytest.raises(ValueError, match="answers: expected at least one problem"):
        diversity([["1"], []], [["a"], []])

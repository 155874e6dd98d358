"""Whether a completion matches an answer, and the interval of a share of right ones."""

import math
import threading
from collections.abc import Callable
from typing import Any

from opsd_train.evaluation.figures import is_chain, is_listed, same_value, ungrouped
from opsd_train.reading.texts import final_answer
from opsd_train.watch.record import Accuracy

Z_95 = 1.959963984540054  # two-sided 95 % point of the normal distribution


def wilson(correct: int, total: int) -> Accuracy:
    """Accuracy with its 95 % Wilson score interval, which is inside [0, 1] and sound at 0 % and 100 % too."""
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"correct: expected 0 <= correct <= total and total >= 1, got {correct} of {total}")
    share, spread = correct / total, Z_95**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return Accuracy(
        correct=correct,
        total=total,
        accuracy=share,
        low=max(centre - half, 0.0),
        high=min(centre + half, 1.0),
    )


def same_text(completion: str, answer: str) -> bool:
    """Equal but for white space around them."""
    return completion.strip() == answer.strip()


def same_number(completion: str, answer: str) -> bool:
    """The last values that both state are equal, see `figures`: `0.75`, `.75`, `3/4`, `75%` are the same.

    Thousands separators and trailing zeros do not matter. Figures that are not one number, like `12.11.2024`
    or `1,2`, and parts of an expression, like those of `2^{10}`, equal nothing.
    """
    return same_value(completion, answer)


def same_mathematics(completion: str, answer: str) -> bool:
    """What the completion states last is mathematically equal to the answer, as `math-verify` has it.

    Of an answer that ends in a boxed or stated one, that counts. A comparison that takes more than seconds is
    a no, except outside the main thread, where nothing can stop it. Dates and times are compared as they
    stand. Raises ValueError for an answer that is not mathematics.
    """
    stated = final_answer(answer) or answer.strip()
    if is_chain(stated):
        return same_value(final_answer(completion) or completion, stated)
    from math_verify import parse, verify  # brings sympy along, which takes its time

    seconds: Any = 5 if threading.current_thread() is threading.main_thread() else None
    expected = parse(f"\\boxed{{{ungrouped(stated)}}}", parsing_timeout=seconds)
    if not expected:
        raise ValueError(f"answer: expected mathematics that math-verify can read; got {answer!r}")
    found = parse(ungrouped(completion), parsing_timeout=seconds)
    if verify(expected, found, timeout_seconds=seconds):
        return True
    return is_listed(stated) and same_value(completion, stated)  # which is read in LaTeX alone


MATCHES: dict[str, Callable[[str, str], bool]] = {
    "exact": same_text,
    "number": same_number,
    "math": same_mathematics,
}

"""Whether a completion matches an answer, and the interval of a share of right ones."""

import math
import re
import threading
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from opsd_train.reading.texts import final_answer
from opsd_train.watch.record import Accuracy

Z_95 = 1.959963984540054  # two-sided 95 % point of the normal distribution
# What looks like a number (a date and a list do too), with its sign unless it is a minus between two numbers.
EXPONENT = r"(?:[eE][+-]?\d+(?!\w))?"
FIGURES = re.compile(r"(?:(?<!\d)-)?\d+(?:[.,]\d+)*" + EXPONENT)
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?" + EXPONENT)
MINUS = str.maketrans(dict.fromkeys("\u2212\ufe63\uff0d", "-"))  # what typesetting has in its place


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
    """The last numbers in both are equal; thousands separators and trailing zeros do not matter.

    A number may have an exponent (`1.5e3`) and any character for its minus. Figures that are not one number,
    like `12.11.2024` or `1,2`, equal nothing.
    """
    found, expected = _last_number(completion), _last_number(answer)
    return found is not None and found == expected


def same_mathematics(completion: str, answer: str) -> bool:
    """What the completion states last is mathematically equal to the answer, as `math-verify` has it.

    Of an answer that ends in a boxed or stated one, that counts. A comparison that takes more than seconds is
    a no, except outside the main thread, where nothing can stop it. Raises ValueError for an answer that is
    not mathematics.
    """
    from math_verify import parse, verify  # brings sympy along, which takes its time

    seconds: Any = 5 if threading.current_thread() is threading.main_thread() else None
    expected = parse(f"\\boxed{{{final_answer(answer) or answer.strip()}}}", parsing_timeout=seconds)
    if not expected:
        raise ValueError(f"answer: expected mathematics that math-verify can read; got {answer!r}")
    return bool(verify(expected, parse(completion, parsing_timeout=seconds), timeout_seconds=seconds))


MATCHES: dict[str, Callable[[str, str], bool]] = {
    "exact": same_text,
    "number": same_number,
    "math": same_mathematics,
}


def last_figures(text: str) -> str | None:
    """The last thing in a text that looks like a number, without the commas between its thousands.

    What is not one number, like `1,2`, is given as it stands; None of a text without figures.
    """
    found = FIGURES.findall(text.translate(MINUS))
    if not found:
        return None
    return str(found[-1]).replace(",", "") if NUMBER.fullmatch(found[-1]) else str(found[-1])


def _last_number(text: str) -> Decimal | None:
    figures = last_figures(text)
    if figures is None or not NUMBER.fullmatch(figures):
        return None
    try:
        return Decimal(figures)
    except InvalidOperation:  # an exponent beyond what there is room for
        return None

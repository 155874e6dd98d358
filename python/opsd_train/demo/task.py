"""The demo's task: three-digit addition, written as text.

A problem reads `123+456=` and its solution `579`. The student is shown the problem; the teacher is shown the
solution in front of it (`579;123+456=`). About one problem in eight is held out, and `a+b` is held out just
when `b+a` is: an accuracy on held-out problems speaks of sums that training never showed in either order.
"""

import hashlib
from dataclasses import asdict, dataclass

import torch

STUDENT_TEMPLATE = "{problem}"
TEACHER_TEMPLATE = "{solution};{problem}"

SMALLEST, LARGEST = 100, 999
HELD_OUT_COUNT = 512
HELD_OUT_SEED = 20_240
# Pretraining stopped at an accuracy on the problems of the seed above, so their accuracy was chosen, not
# measured: what the demo reports comes from a second draw, disjoint from the first.
REPORT_SEED = 20_241


@dataclass(frozen=True)
class Problem:
    """One row of data: the text to complete and the text that completes it."""

    problem: str
    solution: str

    @classmethod
    def addition(cls, a: int, b: int) -> "Problem":
        """The problem `a+b=`; `ValueError` where a summand has not three digits."""
        for name, value in (("a", a), ("b", b)):
            if not SMALLEST <= value <= LARGEST:
                raise ValueError(f"{name}: expected {SMALLEST} to {LARGEST}, got {value}")
        return cls(problem=f"{a}+{b}=", solution=str(a + b))


def is_held_out(a: int, b: int) -> bool:
    """Whether training must never show `a+b`: one pair in eight, the same everywhere and in either order."""
    key = f"{min(a, b)}+{max(a, b)}".encode()
    return hashlib.blake2s(key, digest_size=1).digest()[0] % 8 == 0


def train_problems(count: int, generator: torch.Generator) -> list[dict[str, str]]:
    """`count` problems that are not held out, with replacement, as rows with `problem` and `solution`."""
    return _rows(_draw(count, generator, held_out=False))


def held_out_problems(count: int = HELD_OUT_COUNT, seed: int = HELD_OUT_SEED) -> list[dict[str, str]]:
    """The first `count` distinct held-out problems of a fixed sequence, as rows like `train_problems`."""
    return _rows(_draw(count, torch.Generator().manual_seed(seed), held_out=True, used=set()))


def report_problems(count: int = HELD_OUT_COUNT) -> list[dict[str, str]]:
    """Other held-out problems: in neither order among those on which pretraining chose when to stop."""
    chosen_on = _draw(HELD_OUT_COUNT, torch.Generator().manual_seed(HELD_OUT_SEED), held_out=True, used=set())
    used = {pair for a, b in chosen_on for pair in ((a, b), (b, a))}
    return _rows(_draw(count, torch.Generator().manual_seed(REPORT_SEED), held_out=True, used=used))


def _draw(
    count: int, generator: torch.Generator, *, held_out: bool, used: set[tuple[int, int]] | None = None
) -> list[tuple[int, int]]:
    """Draw `count` pairs: with replacement, or where `used` is given distinct ones that are not in it."""
    if count < 0:
        raise ValueError(f"count: expected at least 0, got {count}")
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        # A block of fixed size, so that a longer draw begins with the shorter one.
        for a, b in torch.randint(SMALLEST, LARGEST + 1, (256, 2), generator=generator).tolist():
            if is_held_out(a, b) == held_out and (used is None or (a, b) not in used):
                pairs.append((a, b))
                if used is not None:
                    used.add((a, b))
    return pairs[:count]


def _rows(pairs: list[tuple[int, int]]) -> list[dict[str, str]]:
    return [asdict(Problem.addition(a, b)) for a, b in pairs]

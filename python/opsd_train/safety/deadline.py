"""The deadline of an evaluation: it is given up where a signal would end it, and the run goes on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTime(Exception):
    """What was under way took longer than it may; see `within`."""


_due: float | None = None  # one evaluation at a time is under way


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What is inside may take so many seconds, 0 for any number of them.

    Raises:
        OutOfTime: it took longer, and was left at the next safe point, see `stops`.
    """
    global _due
    _due = time.monotonic() + seconds if seconds else None
    try:
        yield
    finally:
        _due = None


def is_over() -> bool:
    """Whether the deadline, if there is one, has passed."""
    return _due is not None and time.monotonic() > _due

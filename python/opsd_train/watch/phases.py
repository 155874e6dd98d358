"""Where a step's time goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

# In the order of a step. What is left of it (batches, clipping, the optimizer) is no phase.
PHASES = ("sync", "rollout", "teacher", "student", "loss", "backward")
Phase = Callable[[str], AbstractContextManager[None]]


def untimed(name: str) -> AbstractContextManager[None]:
    """A phase that nobody counts."""
    return nullcontext()


@dataclass
class _Span:
    """One phase under way or done; its ends are seconds, or events of the device."""

    name: str
    begin: Any
    inside: "_Span | None"
    end: Any = None


class Phases:
    """Seconds by phase, summed over steps; a phase inside another counts for itself alone.

    On a GPU the ends of a phase are events in its stream, which wait for nothing: they are read when the step
    is over and the device has been waited for. So a phase there lasts as long as its work does, not as long
    as its launch.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._open: _Span | None = None
        self._running = False
        self._spans: list[_Span] = []
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside; outside of a step (in an evaluation, say) nothing is counted."""
        if name not in PHASES:
            raise ValueError(f"phase: expected one of {', '.join(PHASES)}; got {name!r}")
        if not self._running:
            yield
            return
        span = self._open = _Span(name, self._mark(), self._open)
        try:
            yield
        finally:
            span.end = self._mark()
            self._open = span.inside
            self._spans.append(span)

    def begin_step(self) -> None:
        """Phases count from here on."""
        self._running = True
        self._spans = []

    def end_step(self) -> None:
        """Add the step's phases to the sums. The device has been waited for."""
        for span in self._spans:
            lasted = self._between(span.begin, span.end)
            self.seconds[span.name] = self.seconds.get(span.name, 0.0) + lasted
            if span.inside is not None:
                name = span.inside.name
                self.seconds[name] = self.seconds.get(name, 0.0) - lasted
        self._running, self._spans = False, []

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return float(end - begin)
        return float(begin.elapsed_time(end)) / 1000

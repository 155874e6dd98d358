"""Interleaved times, and whether the machine held still."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]

WARMUPS = 10
WARMUP_SECONDS = 1.0  # no more warm-ups of one contender after this
DRIFT_BOUND = 0.02
FLOOR_CALLS = {"cuda": 10, "cpu": 3}  # at most, before and after a case


@dataclass
class Times:
    """Seconds of the timed calls: of the device's events on a GPU, of the wall clock on a CPU.

    `wall` is the wall clock on a GPU, up to a final synchronize, and empty on a CPU.
    """

    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Drift:
    """Medians of the floor before and after all other calls of a case, in seconds."""

    before: float
    after: float

    @property
    def share(self) -> float:
        """Relative change."""
        return self.after / self.before - 1

    @property
    def exceeds(self) -> bool:
        """Whether the machine changed by more than the bound; NaN counts as a change."""
        return not abs(self.share) <= DRIFT_BOUND


class Stopwatch:
    """Times one call at a time on a device, with cold caches on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            size = max(4 * torch.cuda.get_device_properties().L2_cache_size, 2**26)
            self.flush = torch.empty(size, dtype=torch.int8, device="cuda")

    def __call__(self, call: Call, times: Times) -> None:
        """Runs the call and appends its time."""
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            times.seconds.append(time.perf_counter() - start)
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        times.wall.append(time.perf_counter() - start)
        times.seconds.append(first.elapsed_time(last) / 1000)


def warm_up(call: Call, device: str) -> None:
    """At least one call; up to `WARMUPS` while they are short."""
    start = time.perf_counter()
    for _ in range(WARMUPS):
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if time.perf_counter() - start > WARMUP_SECONDS:
            return


def until_steady(
    measure: Callable[[], tuple[dict[str, Times], Drift]], attempts: int
) -> tuple[dict[str, Times], Drift]:
    """The first measurement without drift, or the last of the attempts."""
    for _ in range(attempts):
        times, drift = measure()
        if not drift.exceeds:
            break
    return times, drift


def interleaved(
    calls: dict[str, Call], floor: str, rounds: int, device: str
) -> tuple[dict[str, Times], Drift]:
    """Times of every call, in ABBA order so that a drift of the machine hits all alike.

    Args:
        calls: by name, warmed up.
        floor: name of the call that is also timed on its own before and after, for the drift.
        rounds: ABBA rounds, two timed calls each.
        device: `"cpu"` or `"cuda"`.
    """
    watch = Stopwatch(device)
    times = {name: Times() for name in calls}
    before, after = Times(), Times()
    floor_calls = min(2 * rounds, FLOOR_CALLS[device])
    for _ in range(floor_calls):
        watch(calls[floor], before)
    for _ in range(rounds):
        for name in [*calls, *reversed(calls)]:
            watch(calls[name], times[name])
    for _ in range(floor_calls):
        watch(calls[floor], after)
    return times, Drift(statistics.median(before.seconds), statistics.median(after.seconds))

"""Everything about one case: who takes part, errors, times, memory."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench import machine, memory
from bench.cases import Case, Inputs
from bench.contenders import EAGER, FLOOR, Contender, static_compilation
from bench.exact import ACCURACY_ROWS, Errors, Exact, describe_data, semantics
from bench.timing import Drift, Times, interleaved, until_steady, warm_up

DRIFT_ATTEMPTS = 2
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        rounds: ABBA rounds, two timed calls each.
        memory: whether to measure peak memory.
        largest_rows: whether to search the largest N that fits.
        memory_limit: bytes of a process for that search on a CPU.
        keep_drifted: whether a case on a machine that did not hold still is kept.
    """

    rounds: int = 3
    memory: bool = True
    largest_rows: bool = False
    memory_limit: int | None = None
    keep_drifted: bool = False


@dataclass
class Result:
    """One line of the table. Seconds; bytes; errors as in `Errors`; `remarks` for a reader."""

    contender: str
    objective: str
    ours: bool = False
    approximate: bool = False
    seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    reserved_bytes: int | None = None
    largest_rows: int | None = None
    value_error: float | None = None
    dh_error: float | None = None
    dh_cosine: float | None = None
    dw_error: float | None = None
    dw_cosine: float | None = None
    other_loss: bool = False
    failed: bool = False
    remarks: list[str] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median of the timed calls in seconds; NaN if there are none."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def wall_median(self) -> float:
        """Median of the wall clock in seconds."""
        return statistics.median(self.wall_seconds) if self.wall_seconds else self.median

    def quantile(self, share: float) -> float:
        """Quantile of the timed calls in seconds, by the nearest rank."""
        ordered = sorted(self.seconds)
        return ordered[round(share * (len(ordered) - 1))] if ordered else float("nan")


@dataclass
class Group:
    """All that was measured of one case; `left_out` is name to reason. A rejected one has no times."""

    case: Case
    results: list[Result]
    left_out: dict[str, str]
    data: dict[str, float]
    clocks: dict[str, str] = field(default_factory=dict)
    drift: Drift | None = None
    rejected: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        drift = None if self.drift is None else {**asdict(self.drift), "share": self.drift.share}
        return {
            "case": self.case.as_dict(),
            "data": self.data,
            "clocks": self.clocks,
            "drift": drift,
            "rejected": self.rejected,
            "left_out": self.left_out,
            "results": [asdict(result) for result in self.results],
        }

    @property
    def wrong(self) -> list[Result]:
        """Ours that must not be trusted: another loss, a failure, or gradients worse than twice eager's."""
        bad = worse_than_eager(self.results)
        return [
            result
            for result in self.results
            if result.ours
            and (result.other_loss or result.failed or (result in bad and not result.approximate))
        ]


class _Run:
    """One case in progress."""

    def __init__(self, case: Case, settings: Settings, contenders: list[Contender], say: Say) -> None:
        self.case, self.settings, self.say = case, settings, say
        self.left_out: dict[str, str] = {}
        self.active: dict[str, Contender] = {}
        self.results: dict[str, Result] = {}
        for contender in contenders:
            reason = contender.why_not(case)
            if reason is not None:
                self.left_out[contender.name] = reason
                continue
            self.active[contender.name] = contender
            self.results[contender.name] = Result(
                contender.name, case.objective, contender.ours, contender.approximate
            )
        self.inputs = Inputs.of(case)

    def each(self, what: str, work: Callable[[Contender, Result], None]) -> None:
        """Does the work for every contender that still takes part; who fails is out, and named."""
        memory.release()
        for name, contender in list(self.active.items()):
            self.say(f"{what}: {name}")
            try:
                work(contender, self.results[name])
            except Exception as error:
                self._drop(contender, error, what)
            self.inputs.clear_gradients()
            memory.release()

    def _drop(self, contender: Contender, error: Exception, what: str) -> None:
        message = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
        result = self.results[contender.name]
        if result.seconds:  # its times stand
            result.failed = contender.ours and not memory.is_out_of_memory(error)
            result.remarks.append(f"{what}: {message}")
            return
        if contender.name in (FLOOR, EAGER) and not memory.is_out_of_memory(error):
            raise error
        del self.active[contender.name]
        if memory.is_out_of_memory(error):
            result.remarks.append("out of memory")
        elif contender.optional and isinstance(error, ValueError | TypeError):
            del self.results[contender.name]
            self.left_out[contender.name] = f"not available here: {message}"
        elif contender.ours:
            result.failed = True
            result.remarks.append(f"FAILED: {message}")
        else:
            del self.results[contender.name]
            self.left_out[contender.name] = f"failed: {message}"

    def errors(self) -> None:
        """Is it the same loss, and how exact."""
        part = self.inputs.first_rows(min(ACCURACY_ROWS, self.case.rows))
        exact = Exact(self.case, part)

        def check(contender: Contender, result: Result) -> None:
            if contender.name == FLOOR:
                return
            other = semantics(contender, self.case).other_loss
            if other is not None:
                result.other_loss = True
                result.remarks.append(other)
            part.clear_gradients()
            _record(result, exact.errors(contender.function(part, self.case), part))
            part.clear_gradients()

        self.each("errors", check)

    def probe(self) -> None:
        """The first call at full size: who runs out of memory, and a GPU's peak memory."""

        def call(contender: Contender, result: Result) -> None:
            self.inputs.clear_gradients()
            contender.function(self.inputs, self.case)
            if self.case.device == "cuda" and self.settings.memory:
                peak = memory.peak_on_gpu(contender, self.case, self.inputs)
                result.extra_bytes, result.reserved_bytes = peak.extra, peak.reserved

        self.each("first call", call)

    def times(self) -> Drift:
        """Interleaved times; measured once more if the machine drifted on a GPU."""
        calls = {name: self._call(contender) for name, contender in self.active.items()}
        for name, call in calls.items():
            self.say(f"warm-up: {name}")
            warm_up(call, self.case.device)

        def measure() -> tuple[dict[str, Times], Drift]:
            self.say("times")
            return interleaved(calls, FLOOR, self.settings.rounds, self.case.device)

        times, drift = until_steady(measure, DRIFT_ATTEMPTS if self.case.device == "cuda" else 1)
        for name, one in times.items():
            self.results[name].seconds, self.results[name].wall_seconds = one.seconds, one.wall
        return drift

    def _call(self, contender: Contender) -> Callable[[], object]:
        def call() -> None:
            self.inputs.clear_gradients()
            contender.function(self.inputs, self.case)

        return call

    def notes(self) -> None:
        """What a contender itself reports, at full size."""

        def note(contender: Contender, result: Result) -> None:
            if contender.note is not None:
                result.remarks.append(contender.note(self.inputs, self.case))

        self.each("notes", note)

    def memories(self) -> None:
        """A CPU's peak memory, and the largest N. The inputs are gone: the search has the whole device."""
        nothing = torch.empty(0)
        self.inputs = Inputs(nothing, nothing, nothing)

        def measure(contender: Contender, result: Result) -> None:
            if self.settings.memory and self.case.device == "cpu":
                peak = memory.peak_on_cpu(contender, self.case)
                result.extra_bytes = None if peak is None else peak.extra
            if self.settings.largest_rows:
                limit = self.settings.memory_limit
                result.largest_rows = memory.largest_rows(contender, self.case, limit)

        self.each("memory", measure)


def run(case: Case, settings: Settings, contenders: list[Contender], say: Say = lambda text: None) -> Group:
    """Every contender on one case; `say` is told what is going on.

    Raises:
        Exception: what the floor or eager PyTorch raises, other than a lack of memory.
    """
    job = _Run(case, settings, contenders, say)
    data = describe_data(case, job.inputs)
    with static_compilation(job.active.values()):
        job.errors()
        job.probe()
        drift = job.times() if FLOOR in job.active else None
        clocks = machine.clocks() if case.device == "cuda" else {}
        job.notes()
        job.memories()
    group = Group(case, list(job.results.values()), job.left_out, data, clocks, drift)
    if is_rejected(drift, case.device, settings.keep_drifted):
        _reject(group)
    for result in worse_than_eager(group.results):
        result.remarks.append("gradient errs more than twice eager's")
    return group


def is_rejected(drift: Drift | None, device: str, keep: bool) -> bool:
    """Whether a case's times must not be used: a GPU that drifted. A shared CPU only earns a warning."""
    return drift is not None and drift.exceeds and device == "cuda" and not keep


def _record(result: Result, errors: Errors) -> None:
    result.value_error = errors.value
    result.dh_error, result.dh_cosine = errors.dh, errors.dh_cosine
    result.dw_error, result.dw_cosine = errors.dw, errors.dw_cosine


def _reject(group: Group) -> None:
    """Takes the times out; errors and memory do not depend on the machine's mood and stay."""
    group.rejected = True
    for result in group.results:
        result.seconds, result.wall_seconds = [], []


def worse_than_eager(results: list[Result]) -> list[Result]:
    """Those whose gradient errs by more than twice what eager PyTorch does: their speed means nothing."""
    (eager,) = (result for result in results if result.contender == EAGER)
    return [
        result
        for result in results
        if _worse(result.dh_error, eager.dh_error) or _worse(result.dw_error, eager.dw_error)
    ]


def _worse(error: float | None, eager: float | None) -> bool:
    return error is not None and eager is not None and not error <= 2 * eager

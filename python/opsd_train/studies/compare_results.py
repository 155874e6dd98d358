"""The numbers of a comparison, from its finished runs: end results and learning curves with intervals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from opsd_train.evaluation.judge import Z_95
from opsd_train.evaluation.passk import Interval, bootstrap, pass_at_k
from opsd_train.studies.compare import Measured, Outcome, Plan
from opsd_train.watch.record import Run, load_run

WINDOW = 5  # logged steps, the least that a point of the entropy's curve is the mean of


class Point(Interval):
    """One point of a curve."""

    step: float


class RunResult(TypedDict):
    """One run; `seconds` is None and `error` says why where it failed."""

    seed: int
    folder: str
    seconds: float | None
    error: str


class MethodResult(TypedDict):
    """One method over its finished runs; what needs one is None or empty where there is none.

    The accuracies, pass@k (by k as text) and differences are fractions, the entropy is in nats. `difference`
    is the sampled accuracy minus that of the first method, on the same problems.
    """

    method: str
    runs: list[RunResult]
    greedy: Interval | None
    sampled: Interval | None
    difference: Interval | None
    pass_at_k: dict[str, Interval]
    entropy: Interval | None
    curves: dict[str, list[Point]]


class Comparison(TypedDict):
    """What `compare.json` holds."""

    command: str
    task: str
    steps: int
    seeds: list[int]
    samples: int
    problems: int | None
    versions: list[dict[str, str]]
    devices: list[str]
    methods: list[MethodResult]


def summarise(plan: Plan, outcomes: Sequence[Outcome], command: str, task: str) -> Comparison:
    """Gather what the runs of `plan` measured.

    Intervals are 95 %. Those of the greedy accuracy are Wilson's, of several seeds the mean of theirs: the
    problems are the same, so seeds do not make the sample of problems larger. All others resample problems,
    each with the mean over seeds of its value. What varies between seeds is in none of them.
    """
    runs = {outcome.folder: load_run(outcome.folder) for outcome in outcomes if outcome.measured}
    finished = list(runs.values())
    by_method = [[o for o in outcomes if o.method == method] for method in plan.methods]
    first = _shares(_measured(by_method[0]))
    return Comparison(
        command=command,
        task=task,
        steps=plan.steps,
        seeds=list(plan.seeds),
        samples=plan.samples,
        problems=next((len(o.measured["correct"]) for o in outcomes if o.measured), None),
        versions=_distinct([run.info["versions"] for run in finished]),
        devices=_distinct([run.info["device"] for run in finished]),
        methods=[_of_method(plan, of_one, runs, first) for of_one in by_method],
    )


def _of_method(
    plan: Plan, outcomes: Sequence[Outcome], runs: Mapping[Path, Run], first: Sequence[float]
) -> MethodResult:
    found = [runs[outcome.folder] for outcome in outcomes if outcome.measured]
    measured = _measured(outcomes)
    shares = _shares(measured)
    greedy, sampled = (_accuracy_curve(found, decoding) for decoding in ("greedy", "sampled"))
    is_first = outcomes[0].method == plan.methods[0]
    return MethodResult(
        method=outcomes[0].method.spec,
        runs=[
            RunResult(
                seed=outcome.seed,
                folder=outcome.folder.name,
                seconds=runs[outcome.folder].info["seconds"] if outcome.measured else None,
                error=outcome.error,
            )
            for outcome in outcomes
        ],
        greedy=_interval(greedy[-1]) if greedy else None,
        sampled=bootstrap(shares) if shares else None,
        difference=None if is_first or not (shares and first) else _difference(shares, first),
        pass_at_k={str(k): _pass_at_k(measured, k) for k in plan.ks} if measured else {},
        entropy=bootstrap(_over_seeds([one["entropy"] for one in measured])) if measured else None,
        curves={"greedy": greedy, "sampled": sampled, "entropy": _entropy_curve(found)},
    )


def _measured(outcomes: Sequence[Outcome]) -> list[Measured]:
    return [outcome.measured for outcome in outcomes if outcome.measured]


def _shares(measured: Sequence[Measured]) -> list[float]:
    """Share of right samples of each problem, the mean over seeds."""
    return _over_seeds([[correct / one["samples"] for correct in one["correct"]] for one in measured])


def _pass_at_k(measured: Sequence[Measured], k: int) -> Interval:
    return bootstrap(
        _over_seeds([[pass_at_k(one["samples"], c, k) for c in one["correct"]] for one in measured])
    )


def _difference(shares: Sequence[float], first: Sequence[float]) -> Interval:
    return bootstrap([one - other for one, other in zip(shares, first, strict=True)])


def _over_seeds(values: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(of_problem) for of_problem in zip(*values, strict=True)]


def _accuracy_curve(runs: Sequence[Run], decoding: Literal["greedy", "sampled"]) -> list[Point]:
    """The runs' evaluations at the steps that all of them have, the mean over seeds of value and bounds."""
    by_step = [{one["step"]: one[decoding] for one in run.evaluations} for run in runs]
    shared = sorted(set(by_step[0]).intersection(*by_step)) if by_step else []
    return [
        Point(
            step=step,
            value=statistics.fmean(of_run[step]["accuracy"] for of_run in by_step),
            low=statistics.fmean(of_run[step]["low"] for of_run in by_step),
            high=statistics.fmean(of_run[step]["high"] for of_run in by_step),
        )
        for step in shared
    ]


def _entropy_curve(runs: Sequence[Run]) -> list[Point]:
    """Running mean of the entropy of the rollouts that were trained on, with its normal interval."""
    by_step: dict[float, list[float]] = {}
    for run in runs:
        for row in run.metrics:
            if math.isfinite(value := row.get("student_entropy", math.nan)):
                by_step.setdefault(row["step"], []).append(value)
    steps = sorted(by_step)
    half = max(WINDOW, len(steps) // 15) // 2
    curve = []
    for at, step in enumerate(steps):
        near = [value for one in steps[max(at - half, 0) : at + half + 1] for value in by_step[one]]
        mean = statistics.fmean(near)
        spread = Z_95 * statistics.stdev(near) / math.sqrt(len(near)) if len(near) > 1 else 0.0
        curve.append(Point(step=step, value=mean, low=mean - spread, high=mean + spread))
    return curve


def _interval(point: Point) -> Interval:
    return Interval(value=point["value"], low=point["low"], high=point["high"])


def _distinct(values: Sequence[Any]) -> list[Any]:
    return [value for at, value in enumerate(values) if value not in values[:at]]

"""One self-contained HTML page about a run: what changed, the curves, and where the teacher disagreed.

The page needs no network and no script; its charts are inline SVG that takes its colours from the page, so
one drawing serves light, dark and paper.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from opsd_train.json_files import write_atomically
from opsd_train.report import charts, highlight
from opsd_train.report.stack import stacked
from opsd_train.report.worst import worst
from opsd_train.watch.journal import cut_offs
from opsd_train.watch.record import Accuracy, Evaluation, Run, load_run
from opsd_train.watch.trends import is_clipped, trends

RESUME = "resume with --resume-from-checkpoint last"


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder, finished or not, and return its path.

    Raises ValueError when the folder is not a run (see `load_run`).
    """
    run = load_run(run_dir)
    # Escaping is switched on by hand: jinja2 goes by the file's name and does not know `.html.j2`.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    settings = {"objective": run.info.get("objective"), **(run.info.get("config") or {})}
    page = environment.get_template("report.html.j2").render(
        title=run.info.get("name") or run.directory.resolve().name,
        banner=banner(run),
        verdict=verdict(run),
        clips=_of_clips(run),
        trends=[*trends(run.metrics, run.evaluations), *cut_offs(run.info)],
        facts=_facts(run),
        problems=run.problems,
        accuracy=_accuracy_rows(run.evaluations),
        charts=_charts(run),
        area=charts,
        groups=highlight.groups(run.rollouts),
        empty=highlight.EMPTY,
        unused=highlight.has_empty(run.rollouts),
        worst=worst(run.rollouts),
        several=any(one.get("samples", 1) > 1 for one in run.evaluations),
        legend=highlight.legend(),
        shown_nats=highlight.TEACHER_SHOWN_NATS,
        config=list(_flat(settings)),
        versions=list(_flat(run.info.get("versions") or {})),
        shades={"light": highlight.palette(dark=False), "dark": highlight.palette(dark=True)},
    )
    path = run.directory / "report.html"
    write_atomically(path, page)
    return path


def _charts(run: Run) -> dict[str, list[charts.Chart]]:
    found = charts.charts(run)
    times = stacked(run.metrics)
    return found if times is None else {**found, "curves": [*found["curves"], times]}


def banner(run: Run) -> str | None:
    """How far a run came that is not finished, and why no further; None for one that is, or does not say."""
    ended = run.info.get("ended", {"how": "finished"})
    if ended is None:
        step = max((row["step"] for row in run.metrics), default=0)
        return f"At step {step:,} when this page was written. If the run was killed, {RESUME}."
    if ended["how"] == "finished":
        return None
    place = f"after step {ended['step']:,}" + (f" of {ended['of']:,}" if ended.get("of") else "")
    if ended["how"] == "stopped":
        return f"Stopped by {ended['why']} {place}; {RESUME}."
    return f"Failed {place}: {ended['why'].rstrip('.')}; {RESUME}."


def verdict(run: Run) -> str:
    """One sentence: greedy accuracy before and after, with its 95 % confidence interval."""
    if not run.evaluations:
        return _without_accuracy(run)
    first, last = run.evaluations[0], run.evaluations[-1]
    before, after = first["greedy"], last["greedy"]
    if first is last:
        return f"Greedy accuracy is {_interval(before)} at step {first['step']:,}."
    went, caveat = "went", "; the intervals overlap, so this is no clear change"
    if after["low"] > before["high"]:
        went, caveat = "rose", ""
    elif after["high"] < before["low"]:
        went, caveat = "fell", ""
    steps = last["step"] - first["step"]
    return (
        f"Greedy accuracy {went} from {_interval(before)} to {_interval(after)} in {steps:,} steps{caveat}."
    )


def _without_accuracy(run: Run) -> str:
    """The loss at both ends, or the forward KL where clips make another number of the loss."""
    key, name = ("forward_kl", "forward KL") if is_clipped(run.info, run.metrics) else ("loss", "loss")
    rows = [row for row in run.metrics if math.isfinite(row.get(key, math.nan))]
    if not rows:
        over = (run.info.get("ended") or {}).get("how") == "finished"
        return "The run is finished; nothing was measured." if over else "Nothing has been measured yet."
    start, end = (f"{row[key]:.4g} at step {row['step']:,}" for row in (rows[0], rows[-1]))
    return f"Accuracy was not measured; the {name} was {start}" + ("." if len(rows) == 1 else f" and {end}.")


def _of_clips(run: Run) -> str | None:
    """Of a loss with clips: how the divergence itself and the entropy went."""
    if not is_clipped(run.info, run.metrics):
        return None
    found = []
    for key, name in (("forward_kl", "Forward KL"), ("student_entropy", "the student's entropy")):
        values = [row[key] for row in run.metrics if math.isfinite(row.get(key, math.nan))]
        if values:
            found.append(f"{name} went from {values[0]:.3g} to {values[-1]:.3g} nats")
    shares = [one for row in run.metrics if math.isfinite(one := row.get("clipped_fraction", math.nan))]
    taken = (
        f" Clips took {sum(shares) / len(shares):.0%} of the divergence: the loss is not it."
        if shares
        else ""
    )
    return f"{', '.join(found)}.{taken}" if found else None


def _interval(accuracy: Accuracy) -> str:
    share, low, high = (100 * accuracy[key] for key in ("accuracy", "low", "high"))
    return f"{share:.1f}\u00a0% (95\u00a0% CI {low:.1f} to {high:.1f})"


def _accuracy_rows(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Rows of the table: by way of decoding, the first and last evaluation and the points gained."""
    ends = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else list(evaluations)
    if not ends:
        return []
    measured = [_measured(one) for one in ends]
    return [
        {
            "decoding": name,
            "cells": [(one["step"], found.get(name)) for one, found in zip(ends, measured, strict=True)],
            "points": _points(measured[0].get(name), measured[-1][name]),
        }
        for name in measured[-1]
    ]


def _measured(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """What an evaluation found, by name; pass@1 of several samples is their accuracy."""
    found: dict[str, dict[str, Any]] = {name: {**evaluation[name]} for name in ("greedy", "sampled")}
    for one in evaluation.get("pass_at_k", []):
        if one["k"] > 1:
            found[f"pass@{one['k']}"] = {**one, "accuracy": one["value"], "total": None}
    return found


def _points(first: Mapping[str, Any] | None, last: Mapping[str, Any]) -> float | None:
    return None if first is None else 100 * (last["accuracy"] - first["accuracy"])


def _facts(run: Run) -> list[tuple[str, str]]:
    """The few things to know about a run, those that were recorded."""
    info = run.info
    steps = max((row["step"] for row in run.metrics), default=0)
    facts = {
        "Model": info.get("model"),
        "Parameters": _count(info.get("parameters")),
        "Objective": _objective(info.get("objective")),
        "Teacher": info.get("teacher"),
        "Steps": f"{steps:,}" if steps else None,
        "Time": _duration(info.get("seconds")),
        "Peak memory": f"{info['peak_memory_gb']:.2f} GB" if info.get("peak_memory_gb") else None,
        "Device": info.get("device"),
        "Started": _moment(info.get("started")),
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _objective(objective: Mapping[str, Any] | None) -> str | None:
    """The divergence and what departs from it; beta says something of the JSD only."""
    if not objective:
        return None
    named = {key: value for key, value in objective.items() if value is not None and key != "divergence"}
    if objective.get("divergence") != "jsd":
        named.pop("beta", None)
    if "entry_clip" not in named:
        named.pop("clip_mode", None)
    divergence = [str(objective["divergence"])] if "divergence" in objective else []
    return ", ".join(divergence + [f"{key} {value}" for key, value in named.items()]).replace("_", " ")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names, what is None left out."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", str(value)


def _count(parameters: float | None) -> str | None:
    if not parameters:
        return None
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g} {name}"
    return str(parameters)


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
    )


def _moment(started: str | None) -> str | None:
    try:
        return datetime.fromisoformat(started).strftime("%d %b %Y, %H:%M %Z").strip() if started else None
    except ValueError:
        return started

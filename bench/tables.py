"""Results as a table on the screen, as JSON and as Markdown."""

import json
import math
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import machine
from bench.cases import Case
from bench.contenders import EAGER, FLOOR
from bench.measure import Group, Result
from bench.memory import LARGEST

TEXT = ("contender", "remarks")  # columns that are not numbers
EXPLANATION = (
    "Forward and backward. The floor is the bare matrix products on the same tensors (student's and "
    "teacher's logits, dH and, unless the head is frozen, dW), over the rows that count, timed between the "
    "contenders in ABBA order. Errors are relative L2 against fp64 on the first rows of the case, 1 - cosine "
    "in brackets. Extra memory is the peak beyond the inputs, gradients included. On a shared machine read "
    "the ratios, not the times."
)


def columns(groups: list[Group]) -> list[str]:
    """Headings; some are left out where no result has a value."""
    results = [result for group in groups for result in group.results]
    names = ["contender", "time", "p20 to p80"]
    if any(result.wall_seconds for result in results):
        names.append("wall clock")
    names += ["/ floor", "/ eager"]
    if any(result.extra_bytes is not None for result in results):
        names += ["extra memory", "memory / eager"]
    if any(result.reserved_bytes is not None for result in results):
        names.append("reserved")
    if any(result.largest_rows is not None for result in results):
        names.append("largest N")
    return [*names, "value error", "dH error", "dW error", "remarks"]


def cells(result: Result, group: Group) -> dict[str, str]:
    """One line of a case's table by heading."""
    by_name = {one.contender: one for one in group.results}
    floor, eager = by_name[FLOOR], by_name[EAGER]
    low, high = result.quantile(0.2), result.quantile(0.8)
    return {
        "contender": result.contender,
        "time": _time(result.median),
        "p20 to p80": "-" if math.isnan(low) else f"{_time(low)} to {_time(high)}",
        "wall clock": _time(result.wall_median),
        "/ floor": _ratio(result.median, floor.median),
        "/ eager": _ratio(result.median, eager.median),
        "extra memory": _mebibytes(result.extra_bytes),
        "memory / eager": _ratio(result.extra_bytes, eager.extra_bytes),
        "reserved": _mebibytes(result.reserved_bytes),
        "largest N": _largest(result.largest_rows),
        "value error": "-" if result.value_error is None else f"{result.value_error:.1e}",
        "dH error": _error(result.dh_error, result.dh_cosine),
        "dW error": _error(result.dw_error, result.dw_cosine),
        "remarks": "; ".join(result.remarks),
    }


def title(case: Case) -> str:
    """What was measured, in one line."""
    parts = [
        f"{case.objective}: N = {case.rows:,}, V = {case.vocab:,}, H = {case.hidden:,}, {case.dtype}",
        "trainable head" if case.trainable_head else "frozen head",
        f"logit gap {case.gap}" if case.recorded is None else f"recorded in {Path(case.recorded).name}",
    ]
    if case.masked:
        parts.append(f"{case.masked:.0%} of the rows masked")
    if case.temperature != 1:
        parts.append(f"temperature {case.temperature}")
    if case.objective == "jsd" and case.beta != 0.5:
        parts.append(f"beta {case.beta}")
    return ", ".join(parts)


def comments(group: Group) -> list[str]:
    """What a reader must know beside the table: data, drift, who is missing and why."""
    data = group.data
    lines = [
        f"Data: logit gap {data['gap']:.3g}, logits' std {data['logit_std']:.2g}, entropy "
        f"{data['student_entropy']:.2g} (student) and {data['teacher_entropy']:.2g} nats (teacher)."
    ]
    if group.drift is not None:
        share = f"{group.drift.share:+.1%}"
        lines.append(f"The floor drifted by {share} from start to end.")
        if group.drift.exceeds:
            verdict = "REJECTED, the times are left out" if group.rejected else "read times with care"
            lines[-1] += f" That is above 2 %: {verdict}."
    if group.clocks:
        lines.append(
            "At the end: " + ", ".join(f"{name} {value}" for name, value in group.clocks.items()) + "."
        )
    if group.left_out:
        lines.append("Left out: " + "; ".join(f"{n} ({why})" for n, why in group.left_out.items()) + ".")
    return lines


def show(group: Group, console: Console) -> None:
    """Prints one case."""
    table = Table(title=title(group.case), title_justify="left")
    for column in columns([group]):
        table.add_column(column, justify="left" if column in TEXT else "right")
    for result in group.results:
        line = cells(result, group)
        table.add_row(*(line[column] for column in columns([group])))
    console.print(table)
    for text in comments(group):
        console.print(text, highlight=False)
    console.print()


def markdown(facts: dict[str, str], groups: list[Group]) -> str:
    """All tables with the machine and the meaning of the columns."""
    parts = ["# Loss, forward and backward", "", f"{machine.line(facts)}.", "", EXPLANATION]
    names = columns(groups)
    for group in groups:
        parts += ["", f"## {title(group.case)}", ""]
        parts.append("| " + " | ".join(names) + " |")
        parts.append("|" + "|".join("---" if name in TEXT else "---:" for name in names) + "|")
        for result in group.results:
            line = cells(result, group)
            parts.append("| " + " | ".join(line[name].replace("|", "\\|") for name in names) + " |")
        parts += ["", *(f"- {text}" for text in comments(group))]
    return "\n".join(parts) + "\n"


def write(folder: Path, facts: dict[str, str], groups: list[Group], settings: dict[str, object]) -> None:
    """results.json and results.md in `folder`, each replaced whole, so that a kill leaves no half."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": facts,
        "commit": facts["commit"],
        "settings": settings,
        "groups": [group.as_dict() for group in groups],
    }
    _replace(folder / "results.json", json.dumps(record, indent=1) + "\n")
    _replace(folder / "results.md", markdown(facts, groups))


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_suffix(path.suffix + ".part")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _ratio(value: float | None, base: float | None) -> str:
    if not value or not base or math.isnan(value) or math.isnan(base):
        return "-"
    return f"{value / base:.2f}"


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"


def _largest(rows: int | None) -> str:
    if rows is None:
        return "-"
    return f"{rows:,}" if rows < LARGEST else f"at least {rows:,}"


def _error(relative: float | None, cosine: float | None) -> str:
    return "-" if relative is None or cosine is None else f"{relative:.1e} ({cosine:.0e})"

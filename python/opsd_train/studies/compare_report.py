"""How a comparison is shown: the table on the terminal, compare.md, compare.json and compare.png."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from opsd_train.evaluation.passk import Interval
from opsd_train.json_files import dumps, write_atomically
from opsd_train.run_folder import check_folder
from opsd_train.studies.compare_results import Comparison, MethodResult, Point

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = ("compare.json", "compare.md", "compare.png")
CAPTION = (
    "95 % confidence intervals in brackets, Wilson's for the greedy accuracy, else by resampling problems. "
    "Sampled accuracy is pass@1; vs first: its difference from the first method's on the same problems."
)
LABEL = 20  # characters of a method's name or option that are not broken on a narrow terminal
COLOURS = ("#0b5fa5", "#d9730d", "#2e8b3d", "#8e44ad", "#c0392b", "#7f6a00", "#138d90", "#555555")
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vPXh"


def check_results(folder: Path) -> None:
    """ValueError for results in a folder that are no comparison's, which `write` would replace."""
    check_folder(folder)
    held = [name for name in RESULTS if (folder / name).exists()]
    try:
        found = json.loads((folder / RESULTS[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if held and not (isinstance(found, dict) and set(Comparison.__annotations__) <= found.keys()):
        raise ValueError(f"out: expected no {held[0]} but a comparison's in {folder}; choose another folder")


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write compare.json, compare.md and, where a run has finished, compare.png; returns their paths."""
    numbers, table, curves = (folder / name for name in RESULTS)
    write_atomically(numbers, dumps(comparison, indent=1))
    picture = draw(comparison, curves)
    write_atomically(table, markdown(comparison, picture))
    return [numbers, table, curves] if picture else [numbers, table]


def table(comparison: Comparison) -> Table:
    """A line per method."""
    headings, lines = _lines(comparison)
    shown = Table(title=_title(comparison), caption=CAPTION, box=SIMPLE_HEAD, padding=0)
    # Narrow: an interval below its value, its end below its beginning, an option below its name.
    labels = [method.replace(":", "\n:") for method, *_ in lines]
    widest = max((len(part) for label in labels for part in label.split("\n")), default=0)
    for at, heading in enumerate(headings):
        shown.add_column(
            heading.replace(" ", "\n"), overflow="fold", min_width=min(widest, LABEL) if at == 0 else None
        )
    for label, (_, *cells) in zip(labels, lines, strict=True):
        cells = [cell.replace(" (", "\n(").replace(" to ", ",\n") for cell in cells]
        shown.add_row(*map(escape, [label, *cells]))
    return shown


def markdown(comparison: Comparison, picture: bool) -> str:
    """The same table with what the runs were made with."""
    headings, lines = _lines(comparison)
    rows = [headings, ["---"] * len(headings), *lines]
    text = [f"# {_title(comparison)}", ""]
    text += [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    text += [
        "",
        "95 % confidence intervals in brackets: Wilson's for the greedy accuracy, else resampled problems.",
    ]
    text += ["", "![Learning curves, entropy and pass@k](compare.png)"] if picture else []
    text += ["", f"Command: `{comparison['command']}`", ""]
    text += [f"Device: {', '.join(comparison['devices'])}", ""] if comparison["devices"] else []
    for versions in comparison["versions"]:
        text += ["Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()), ""]
    return "\n".join(text)


def draw(comparison: Comparison, path: Path) -> bool:
    """Write the picture; False without a finished run, when there is nothing to draw."""
    shown = [method for method in comparison["methods"] if method["pass_at_k"]]
    if not shown:
        path.unlink(missing_ok=True)
        return False
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 6.4 + 0.22 * len(shown)), layout="constrained")
    for axis, name, title in zip(
        axes.flat,
        ("greedy", "sampled", "entropy"),
        ("Held-out accuracy, greedy, %", "Held-out accuracy, sampled, %", "Entropy of the student, nats"),
        strict=False,
    ):
        for at, method in enumerate(shown):
            scale = 1.0 if name == "entropy" else 100.0
            _curve(axis, method["curves"][name], scale, _style(at), dots=name != "entropy")
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
    _pass_at_k(axes[1][1], shown)
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[1][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(shown), 2), fontsize=9)
    figure.suptitle(f"{_title(comparison)}\nbands and bars: 95 % confidence intervals", fontsize=11)
    figure.savefig(path, dpi=120, facecolor="white")
    plt.close(figure)
    return True


def _curve(axis: Axes, points: Sequence[Point], scale: float, style: dict[str, Any], dots: bool) -> None:
    steps = [point["step"] for point in points]
    low, value, high = ([scale * point[key] for point in points] for key in ("low", "value", "high"))
    axis.plot(steps, value, **(style if dots else {**style, "marker": ""}))
    axis.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _pass_at_k(axis: Axes, methods: Sequence[MethodResult]) -> None:
    """A place for each k, in it the methods side by side."""
    ks = list(methods[0]["pass_at_k"])
    for at, method in enumerate(methods):
        found = [method["pass_at_k"][k] for k in ks]
        places = [place + 0.6 * ((at + 0.5) / len(methods) - 0.5) for place in range(len(ks))]
        value = [100 * one["value"] for one in found]
        below = [100 * (one["value"] - one["low"]) for one in found]
        above = [100 * (one["high"] - one["value"]) for one in found]
        style = {**_style(at), "linestyle": ""}
        axis.errorbar(places, value, yerr=[below, above], capsize=2, label=method["method"], **style)
    axis.set_xlim(-0.5, len(ks) - 0.5)
    axis.set_ylim(bottom=0)
    axis.set_xticks(range(len(ks)), [f"k = {k}" for k in ks])
    axis.set_title("pass@k at the end, %", fontsize=10)


def _style(at: int) -> dict[str, Any]:
    return {
        "color": COLOURS[at % len(COLOURS)],
        "linestyle": DASHES[at // len(COLOURS) % len(DASHES)],
        "marker": MARKERS[at % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.4,
    }


def _title(comparison: Comparison) -> str:
    count = len(comparison["seeds"])
    problems = f", {comparison['problems']:,} held-out problems" if comparison["problems"] else ""
    return f"{comparison['task']}: {comparison['steps']:,} steps, {count} seed{'s' * (count > 1)}{problems}"


def _lines(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; a column of errors only where there are some."""
    ks = next((list(method["pass_at_k"]) for method in comparison["methods"] if method["pass_at_k"]), [])
    ks = [k for k in ks if k != "1"]  # the sampled accuracy
    failed = any(run["error"] for method in comparison["methods"] for run in method["runs"])
    headings = ["method", "greedy, %", "sampled, %", "vs first"]
    headings += [*(f"pass@{k}, %" for k in ks), "entropy, nats", "s", *(["failed"] if failed else [])]
    lines = []
    for method in comparison["methods"]:
        seconds = sum(run["seconds"] or 0 for run in method["runs"])
        errors = [f"seed {run['seed']}: {run['error']}" for run in method["runs"] if run["error"]]
        lines.append(
            [
                method["method"],
                *(_cell(method[key], 100, 1) for key in ("greedy", "sampled", "difference")),
                *(_cell(method["pass_at_k"].get(k), 100, 1) for k in ks),
                _cell(method["entropy"], 1, 3),
                f"{seconds:,.0f}" if seconds else "-",
                *(["; ".join(" ".join(error.split()) for error in errors)] if failed else []),
            ]
        )
    return headings, lines


def _cell(found: Interval | None, scale: float, digits: int) -> str:
    if found is None:
        return "-"
    value, low, high = (f"{scale * found[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"

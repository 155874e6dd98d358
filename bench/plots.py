"""PNG plots of the results: time against gradient error, and bars of time and memory."""

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from bench.contenders import EAGER, FLOOR

Group = dict[str, Any]  # as in results.json
Line = dict[str, Any]

OURS = "opsd_kernels"
COLOURS = {  # by how the name starts; a contender's place among its family decides its marker
    OURS: "#0b5fa5",
    "eager": "#555555",
    "torch.compile": "#9a9a9a",
    "Liger": "#d9730d",
    "TRL": "#2e8b3d",
    "fla": "#8e44ad",
}
MARKERS = "osD^vPXh"
MIB = 2**20
LEGEND_INCHES = 2.8
LIMIT: dict[str, Any] = {"color": "#aa3333", "linewidth": 1.0, "linestyle": ":"}


def draw(groups: list[Group], folder: Path) -> list[Path]:
    """Two PNGs per shape in `folder`, for all of its objectives and gaps; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, same in _by_shape(groups).items():
        styles = _styles(same)
        for kind, figure in (("error", _error_figure(same, styles)), ("bars", _bar_figure(same))):
            if figure is None:
                continue
            path = folder / f"{kind}-{name}.png"
            figure.savefig(path, dpi=120, bbox_inches="tight", facecolor="white")
            plt.close(figure)
            written.append(path)
    return written


def _by_shape(groups: list[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(_shape_name(group["case"]), []).append(group)
    return found


def _shape_name(case: dict[str, Any]) -> str:
    parts = [f"n{case['rows']}", f"v{case['vocab']}", f"h{case['hidden']}", case["dtype"]]
    parts += [] if case["trainable_head"] else ["frozen"]
    parts += [f"masked{case['masked']}"] if case["masked"] else []
    parts += [Path(case["recorded"]).stem] if case["recorded"] else []
    return "-".join(parts)


def _shape_title(case: dict[str, Any]) -> str:
    head = "" if case["trainable_head"] else ", frozen head"
    masked = f", {case['masked']:.0%} of the rows masked" if case["masked"] else ""
    return (
        f"N = {case['rows']:,}, V = {case['vocab']:,}, H = {case['hidden']:,}, {case['dtype']}{head}{masked}"
    )


def _gap_text(case: dict[str, Any]) -> str:
    return "recorded states" if case["recorded"] else f"logit gap {case['gap']}"


def _styles(groups: list[Group]) -> dict[str, dict[str, Any]]:
    names = dict.fromkeys(line["contender"] for group in groups for line in group["results"])
    counters = {start: itertools.cycle(MARKERS) for start in COLOURS}
    styles = {}
    for name in names:
        start = next((start for start in COLOURS if name.startswith(start)), None)
        if start is not None:
            # Peers are hollow and lie above ours, so that equal results all show.
            hollow = start != OURS
            styles[name] = {
                "color": COLOURS[start],
                "marker": next(counters[start]),
                "markerfacecolor": "none" if hollow else COLOURS[start],
                "markeredgewidth": 1.6,
                "markersize": 8 if hollow else 6,
                "zorder": 4 if hollow else 3,
            }
    return styles


def _median(line: Line) -> float:
    return statistics.median(line["seconds"]) if line["seconds"] else math.nan


def _floor(group: Group) -> float:
    return next((_median(line) for line in group["results"] if line["contender"] == FLOOR), math.nan)


def _gradient_error(line: Line) -> float:
    errors = [line[name] for name in ("dh_error", "dw_error") if line[name] is not None]
    return max(errors, default=math.nan)


def _error_figure(groups: list[Group], styles: dict[str, dict[str, Any]]) -> Any:
    """A panel for each gap (rows) and objective (columns), log axes; None without times."""
    objectives = list(dict.fromkeys(group["case"]["objective"] for group in groups))
    gaps = list(dict.fromkeys(_gap_text(group["case"]) for group in groups))
    if all(math.isnan(_floor(group)) for group in groups):
        return None
    figure, axes = plt.subplots(
        len(gaps),
        len(objectives),
        figsize=(3.4 * len(objectives) + LEGEND_INCHES, max(3.2 * len(gaps), 4.4) + 0.4),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for group in groups:
        case = group["case"]
        axis = axes[gaps.index(_gap_text(case))][objectives.index(case["objective"])]
        axis.set_visible(True)
        axis.set_title(f"{case['objective']}, {_gap_text(case)}", fontsize=10)
        _error_panel(axis, group, styles)
    figure.supylabel("time / bare matrix products", fontsize=10)
    figure.supxlabel("relative error of the gradient, the larger of dH and dW", fontsize=10)
    figure.suptitle(f"{_shape_title(groups[0]['case'])}\nlower left is better", fontsize=11)
    handles = [Line2D([], [], linestyle="", label=name, **style) for name, style in styles.items()]
    handles.append(Line2D([], [], label="twice eager's error", **LIMIT))
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    return figure


def _error_panel(axis: Axes, group: Group, styles: dict[str, dict[str, Any]]) -> None:
    floor = _floor(group)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for line in group["results"]:
        style = styles.get(line["contender"])
        x, y = _gradient_error(line), _median(line) / floor
        if style is None or not (math.isfinite(x) and math.isfinite(y) and x > 0):
            continue
        axis.plot(x, y, linestyle="", **style)
        if line["contender"] == EAGER:
            axis.axvline(2 * x, **LIMIT)
    axis.axhline(1, color="black", linewidth=0.8)
    for subset in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        subset(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(LogLocator(subs=(1.2, 1.5, 2, 3, 5, 7)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    low, high = axis.get_xlim()
    if high < 30 * low:  # a range with fewer than two powers of ten would have no labels
        axis.set_xlim(low / 5, high * 5)
    axis.tick_params(which="both", labelsize=8)
    axis.grid(which="major", linewidth=0.4, alpha=0.7)


def _bar_figure(groups: list[Group]) -> Any:
    """Bars of time and of memory, a row of panels for each objective at its first gap; None without any."""
    firsts = {group["case"]["objective"]: group for group in reversed(groups)}
    shown = [firsts[name] for name in dict.fromkeys(group["case"]["objective"] for group in groups)]
    timed = any(not math.isnan(_floor(group)) for group in shown)
    weighed = any(line["extra_bytes"] is not None for group in shown for line in group["results"])
    if not timed and not weighed:
        return None
    heights = [0.7 + 0.24 * len(group["results"]) for group in shown]
    figure, axes = plt.subplots(
        len(shown),
        timed + weighed,
        figsize=(2.5 + 4.5 * (timed + weighed), sum(heights) + 0.5),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for panels, group in zip(axes, shown, strict=True):
        lines, left = group["results"][::-1], True
        if timed:
            ratios = [_median(line) / _floor(group) for line in lines]
            _bars(panels[0], lines, ratios, "{:.2f}")
            panels[0].axvline(1, color="black", linewidth=0.8)
            panels[0].set_title("time / bare matrix products", fontsize=9)
            left = False
        if weighed:
            extra = [math.nan if line["extra_bytes"] is None else line["extra_bytes"] / MIB for line in lines]
            _bars(panels[-1], lines, extra, "{:,.0f}", named=left)
            panels[-1].set_title("peak memory beyond the inputs, MiB", fontsize=9)
        panels[0].set_ylabel(
            f"{group['case']['objective']}\n{_gap_text(group['case'])}", fontsize=10, labelpad=10
        )
    figure.suptitle(_shape_title(groups[0]["case"]), fontsize=11)
    return figure


def _bars(axis: Axes, lines: list[Line], values: list[float], form: str, named: bool = True) -> None:
    names = [line["contender"] for line in lines]
    colours = [next((c for start, c in COLOURS.items() if name.startswith(start)), "black") for name in names]
    bars = axis.barh(names, [0 if math.isnan(v) else v for v in values], color=colours, height=0.7)
    axis.bar_label(bars, ["-" if math.isnan(v) else form.format(v) for v in values], fontsize=7, padding=2)
    axis.tick_params(labelsize=8, labelleft=named)
    axis.margins(x=0.14)
    axis.spines[["top", "right"]].set_visible(False)

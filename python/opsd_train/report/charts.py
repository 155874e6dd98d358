"""The geometry of the report's charts; `report.html.j2` draws it as inline SVG in the page's own colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from opsd_train.watch.metrics import BUCKETS, bucket_name
from opsd_train.watch.record import Evaluation, Run
from opsd_train.watch.trends import is_clipped

WIDTH, HEIGHT = 340, 180
LEFT, RIGHT, TOP, BOTTOM = 38, WIDTH - 10, 10, HEIGHT - 24

SMOOTH_FROM = 40  # values; a shorter curve is drawn as it is
MAX_VERTICES = 480


@dataclass(frozen=True)
class Series:
    """Values over steps, a NaN being a gap; `bars` gives the error bar (low, high) of each value.

    A long noisy series gets its running mean drawn over it.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    bars: Sequence[tuple[float, float]] = ()
    noisy: bool = True


@dataclass(frozen=True)
class Line:
    """One drawn series: SVG paths and dots (x, y, bar top, bar bottom, words), and its last value."""

    label: str
    path: str
    raw: str
    dots: list[tuple[float, float, float, float, str]]
    last: str


@dataclass(frozen=True)
class Area:
    """One layer of a stack: an SVG path, and the layer's last value."""

    label: str
    path: str
    last: str


@dataclass(frozen=True)
class Chart:
    """One drawn chart of lines or of areas; ticks are (position, label)."""

    title: str
    unit: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    note: str
    areas: Sequence[Area] = ()
    constant: bool = False


@dataclass(frozen=True)
class Frame:
    """The axes of a chart: where a value of a step stands."""

    x_marks: list[float]
    y_marks: list[float]
    x_end: float

    @classmethod
    def around(cls, low: float, high: float, last_step: float) -> "Frame":
        """Axes that enclose values from `low` <= 0 to `high` >= 0, and steps from 0."""
        x_marks = [x for x in ticks(0, last_step) if x == round(x)]
        return cls(x_marks, ticks(low, high), max(x_marks[-1], last_step, 1))

    def x(self, step: float) -> float:
        """Position of a step."""
        return round(LEFT + (RIGHT - LEFT) * step / self.x_end, 1)

    def y(self, value: float) -> float:
        """Position of a value."""
        low, high = self.y_marks[0], self.y_marks[-1]
        return round(BOTTOM + (TOP - BOTTOM) * (value - low) / (high - low), 1)

    def labels(self) -> tuple[list[tuple[float, str]], list[tuple[float, str]]]:
        """The ticks of both axes."""
        return [(self.x(x), number(x)) for x in self.x_marks], [(self.y(y), number(y)) for y in self.y_marks]


def charts(run: Run) -> dict[str, list[Chart]]:
    """Draw what the run has: "accuracy" (none or one), "curves", the "small" side ones and the "constant"."""
    curves = [
        _of_metrics(run, "KL divergence", "nats", forward_kl="forward", reverse_kl="reverse"),
        _of_metrics(run, "Entropy", "nats", student_entropy="student", teacher_entropy="teacher"),
        _of_metrics(run, "Top-1 agreement", "%", scale=100, top1_agreement=""),
        _of_metrics(run, "Forward KL by position", "nats", 1, True, **_positions(run)),
    ]
    clipped = is_clipped(run.info, run.metrics)
    loss = _of_metrics(run, "Loss, clips applied" if clipped else "Loss", "", loss="")
    curves.insert(2 if clipped else 0, loss)
    small = [
        _of_metrics(run, "Speed", "tokens/s", tokens_per_second=""),
        _of_metrics(run, "Memory", "GB", memory_gb="in use", peak_memory_gb="peak"),
        _of_metrics(
            run,
            "Completion length",
            "tokens",
            completion_length="mean",
            completion_length_max="max",
            completion_length_min="min",
        ),
        _of_metrics(run, "Truncated share", "%", scale=100, truncated_share=""),
        _of_metrics(run, _of_top(run), "%", scale=100, teacher_mass="teacher", student_mass="student"),
        _of_metrics(run, "Reward", "", reward=""),
        _of_metrics(run, "Clipped share", "%", scale=100, clipped_fraction=""),
        _of_metrics(run, "Gradient norm", "", grad_norm=""),
        _of_metrics(run, "Learning rate", "", noisy=False, learning_rate=""),
        _of_metrics(run, "Engine's log-probs off by", "nats", engine_difference=""),
        _of_metrics(run, "Skipped steps", "", noisy=False, skipped_steps=""),
    ]
    accuracy = draw("Held-out accuracy", "%", _of_evaluations(run.evaluations), top=100)
    return {
        "accuracy": [accuracy] if accuracy else [],
        "curves": [chart for chart in curves if chart],
        "small": [chart for chart in small if chart and not chart.constant],
        "constant": [chart for chart in small if chart and chart.constant],
    }


def draw(title: str, unit: str, series: Sequence[Series], top: float | None = None) -> Chart | None:
    """Lay out one chart, its y axis up to `top` or the data; None when no value is finite."""
    shown = [one for one in series if any(math.isfinite(value) for value in one.values)]
    if not shown:
        return None
    values = [value for one in shown for value in one.values if math.isfinite(value)]
    high = max(0.0, *values) if top is None else top
    frame = Frame.around(min(0.0, *values), high, max(step for one in shown for step in one.steps))

    def path(points: Sequence[tuple[float, float]]) -> str:
        return _path([(frame.x(x), frame.y(y) if math.isfinite(y) else math.nan) for x, y in points])

    lines, missing = [], 0
    for one in shown:
        points = list(zip(one.steps, one.values, strict=True))
        missing += sum(not math.isfinite(y) for _, y in points)
        window = len(points) // 15 | 1 if one.noisy and len(points) >= SMOOTH_FROM else 1
        last = next(y for _, y in reversed(points) if math.isfinite(y))
        dots = [
            (frame.x(x), frame.y(y), frame.y(bar[1]), frame.y(bar[0]), _words(one.label, x, y, bar, unit))
            for (x, y), bar in zip(points, one.bars, strict=False)
        ]
        drawn = path(_thin(_smooth(points, window)))
        lines.append(Line(one.label, drawn, path(_thin(points)) if window > 1 else "", dots, number(last)))
    note = f"{missing:,} not finite" if missing else ""
    flat = all(len({y for y in one.values if math.isfinite(y)}) == 1 for one in shown)
    return Chart(title, unit, *frame.labels(), lines, note, constant=flat and len(shown[0].values) > 1)


def ticks(low: float, high: float) -> list[float]:
    """Two to seven round numbers that enclose `low` <= 0 and `high` >= 0, zero among them."""
    span = high - low
    if span < 1e-12:
        return [0.0, 1.0]
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= span / 4 * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def number(value: float) -> str:
    """A number for an axis: three significant digits, 12k for thousands, 2e-4 for the very small."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.3g}k" if abs(value) < 999_500 else f"{value / 1e6:,.3g}M"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _of_metrics(
    run: Run, title: str, unit: str, scale: float = 1, noisy: bool = True, **labels: str
) -> Chart | None:
    steps = [row["step"] for row in run.metrics]
    return draw(
        title,
        unit,
        [
            Series(label, steps, [scale * row.get(key, math.nan) for row in run.metrics], noisy=noisy)
            for key, label in labels.items()
        ],
    )


def _of_top(run: Run) -> str:
    """Of how many of the student's most likely tokens the mass is."""
    k = (run.info.get("config") or {}).get("mass_top_k")
    return f"Mass on the student's {k or ''} most likely tokens".replace("  ", " ")


def _positions(run: Run) -> dict[str, str]:
    """Those buckets of positions that completions of the run reached; none if it is the first alone."""
    found = {
        bucket_name(bucket): bucket_name(bucket)[3:].replace("_up", "+").replace("_", " to ")
        for bucket in BUCKETS
        if any(bucket_name(bucket) in row for row in run.metrics)
    }
    return found if len(found) > 1 else {}


def _of_evaluations(evaluations: Sequence[Evaluation]) -> list[Series]:
    """Greedy and sampled accuracy and pass@k above 1, in percent, each over the steps that have it."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for one in evaluations:
        for name in ("greedy", "sampled"):
            cell = one[name]
            found.setdefault(name, []).append((one["step"], cell["accuracy"], cell["low"], cell["high"]))
        for at in one.get("pass_at_k", []):
            if at["k"] > 1:
                points = found.setdefault(f"pass@{at['k']}", [])
                points.append((one["step"], at["value"], at["low"], at["high"]))
    return [
        Series(
            name,
            [step for step, *_ in points],
            [100 * value for _, value, *_ in points],
            [(100 * low, 100 * high) for *_, low, high in points],
        )
        for name, points in found.items()
    ]


def _words(label: str, step: float, value: float, bar: tuple[float, float], unit: str) -> str:
    return f"{label}, step {step:,.0f}: {value:.1f} {unit} (95 % CI {bar[0]:.1f} to {bar[1]:.1f})"


def _smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Centred running mean over `window` values, gaps left as gaps."""
    half, smoothed = window // 2, []
    for at, (x, y) in enumerate(points):
        near = [v for _, v in points[max(at - half, 0) : at + half + 1] if math.isfinite(v)]
        smoothed.append((x, sum(near) / len(near) if math.isfinite(y) else math.nan))
    return smoothed


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep the lowest and the highest value of each stretch, so that a long curve keeps its spikes."""
    if len(points) <= MAX_VERTICES:
        return list(points)
    length = -(-len(points) // (MAX_VERTICES // 2))
    kept = []
    for start in range(0, len(points), length):
        stretch = [point for point in points[start : start + length] if math.isfinite(point[1])]
        if not stretch:
            kept.append(points[start])
            continue
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _path(points: Sequence[tuple[float, float]]) -> str:
    """Join points to an SVG path; one between two gaps becomes a short dash."""
    parts = []
    for finite, stretch in groupby(points, key=lambda point: math.isfinite(point[1])):
        if finite:
            whole = list(stretch)
            if len(whole) == 1:
                parts.append(f"M{whole[0][0] - 2:g},{whole[0][1]:g}h4")
            else:
                parts.append("M" + "L".join(f"{x:g},{y:g}" for x, y in whole))
    return "".join(parts)

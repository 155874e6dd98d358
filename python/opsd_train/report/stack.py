"""The time of a step by phase, one upon the other, for the report."""

import math
from collections.abc import Mapping, Sequence

from opsd_train.report.charts import Area, Chart, Frame, number
from opsd_train.watch.phases import PHASES

MAX_STRETCHES = 120


def stacked(metrics: Sequence[Mapping[str, float]]) -> Chart | None:
    """The seconds of a step by phase, one upon the other; None for a run that did not measure them."""
    rows = [row for row in metrics if math.isfinite(row.get("step_seconds", math.nan))]
    if not rows:
        return None
    length = -(-len(rows) // MAX_STRETCHES)  # a long run is drawn as means of stretches
    stretches = [rows[start : start + length] for start in range(0, len(rows), length)]
    steps = [part[-1]["step"] for part in stretches]
    layers = {
        name: [_mean([row.get(f"{name}_seconds", 0.0) for row in part]) for part in stretches]
        for name in PHASES
    }
    whole = [_mean([row["step_seconds"] for row in part]) for part in stretches]
    known = [sum(values) for values in zip(*layers.values(), strict=True)]
    layers["other"] = [max(all_ - part, 0.0) for all_, part in zip(whole, known, strict=True)]
    if len(steps) == 1:  # one line of metrics is drawn as a bar
        steps, layers = [0, *steps], {name: values * 2 for name, values in layers.items()}
    frame = Frame.around(0.0, max(map(max, zip(whole, known, strict=True))), steps[-1])
    base, areas = [0.0] * len(steps), []
    for name, values in layers.items():
        top = [low + value for low, value in zip(base, values, strict=True)]
        ends = [*zip(steps, top, strict=True), *reversed(list(zip(steps, base, strict=True)))]
        path = "M" + "L".join(f"{frame.x(x):g},{frame.y(y):g}" for x, y in ends) + "Z"
        if sum(values) > 0.005 * sum(whole):
            areas.append(Area(name, path, number(values[-1])))
        base = top
    return Chart("Time of a step", "s", *frame.labels(), [], "", areas)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else 0.0

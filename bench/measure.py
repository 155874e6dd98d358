"""Time, memory and gradient error of one contender on one case."""

import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.cases import Case, Inputs
from bench.contenders import CONTENDERS, EAGER, FLOOR
from opsd_kernels import loss

ACCURACY_ROWS = 256


@dataclass
class Result:
    """One line of the table. Seconds; bytes beyond the inputs; relative L2 errors against fp64."""

    contender: str
    objective: str
    seconds: list[float]
    extra_bytes: int | None = None
    dh_error: float | None = None
    dw_error: float | None = None

    @property
    def median(self) -> float:
        """Median of the timed calls in seconds."""
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        """Quantile of the timed calls in seconds, by the nearest rank."""
        ordered = sorted(self.seconds)
        return ordered[round(share * (len(ordered) - 1))]


def interleaved_times(case: Case, inputs: Inputs, repeats: int) -> dict[str, list[float]]:
    """Seconds of every contender, called in ABBA order so that a drift of the machine hits all alike."""
    names = list(CONTENDERS)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        _timed(name, case, inputs)
    for _ in range(repeats):
        for name in [*names, *reversed(names)]:
            seconds[name].append(_timed(name, case, inputs))
    return seconds


def _timed(name: str, case: Case, inputs: Inputs) -> float:
    inputs.clear_gradients()
    start = time.perf_counter()
    CONTENDERS[name](inputs, case.objective)
    return time.perf_counter() - start


def gradient_errors(name: str, case: Case, inputs: Inputs) -> tuple[float, float | None]:
    """Relative L2 error of dH and dW against the fp64 reference, on the first rows of the case."""
    part = inputs.first_rows(min(ACCURACY_ROWS, case.rows))
    exact = Inputs(
        part.student.detach().double().requires_grad_(),
        part.teacher.double(),
        part.head.detach().double().requires_grad_(case.trainable_head),
    )
    loss(exact.student, exact.teacher, exact.head, objective=case.objective, backend="reference").backward()
    CONTENDERS[name](part, case.objective)
    dw = _relative(part.head.grad, exact.head.grad) if case.trainable_head else None
    return _relative(part.student.grad, exact.student.grad), dw


def _relative(actual: torch.Tensor | None, exact: torch.Tensor | None) -> float:
    assert actual is not None
    assert exact is not None
    return float((actual.double() - exact).norm() / exact.norm())


def extra_memory(name: str, case: Case) -> int | None:
    """Peak bytes that a forward and backward hold beyond the inputs, in a process of its own.

    Peak resident memory, so it counts what PyTorch's own temporaries and the matrix library take. None where
    the system does not tell (it needs Linux's /proc).
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    request = json.dumps({"name": name, "case": case.as_dict()})
    command = [sys.executable, "-m", "bench.measure", request]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.split()[-1])


def _memory_worker(request: str) -> int:
    asked = json.loads(request)
    case = Case(**asked["case"])
    inputs = Inputs.of(case)
    contender = CONTENDERS[asked["name"]]
    contender(inputs.first_rows(8), case.objective)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    contender(inputs, case.objective)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", text)
    assert match is not None, f"/proc/self/status has no {field}"
    return int(match.group(1)) * 1024


def run(case: Case, repeats: int) -> list[Result]:
    """Every contender on one case."""
    inputs = Inputs.of(case)
    seconds = interleaved_times(case, inputs, repeats)
    inputs.clear_gradients()
    results = []
    for name in CONTENDERS:
        result = Result(name, case.objective, seconds[name], extra_memory(name, case))
        if name != FLOOR:
            result.dh_error, result.dw_error = gradient_errors(name, case, inputs)
        results.append(result)
    return results


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


if __name__ == "__main__":
    print(_memory_worker(sys.argv[1]))

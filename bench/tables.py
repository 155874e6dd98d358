"""Results as a table on the screen, as JSON and as Markdown."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import opsd_kernels
from bench.cases import Case
from bench.contenders import EAGER, FLOOR
from bench.measure import Result

COLUMNS = (
    "contender",
    "time",
    "p20 to p80",
    "/ floor",
    "/ eager",
    "extra memory",
    "/ eager",
    "dH error",
    "dW error",
)


def rows(results: list[Result]) -> list[list[str]]:
    """The cells of one objective's table, in the order of `COLUMNS`."""
    by_name = {result.contender: result for result in results}
    floor, eager = by_name[FLOOR], by_name[EAGER]
    cells = []
    for result in results:
        memory, eager_memory = result.extra_bytes, eager.extra_bytes
        cells.append(
            [
                result.contender,
                f"{result.median:.3f} s",
                f"{result.quantile(0.2):.3f} to {result.quantile(0.8):.3f} s",
                f"{result.median / floor.median:.2f}",
                f"{result.median / eager.median:.2f}",
                "-" if memory is None else f"{memory / 2**20:,.0f} MiB",
                "-" if memory is None or not eager_memory else f"{memory / eager_memory:.2f}",
                "-" if result.dh_error is None else f"{result.dh_error:.1e}",
                "-" if result.dw_error is None else f"{result.dw_error:.1e}",
            ]
        )
    return cells


def title(case: Case) -> str:
    """What was measured, in one line."""
    head = "trainable head" if case.trainable_head else "frozen head"
    return (
        f"{case.objective}: N = {case.rows:,}, V = {case.vocab:,}, H = {case.hidden:,}, {case.dtype}, "
        f"{head}, logit gap {case.gap}"
    )


def show(case: Case, results: list[Result]) -> None:
    """Prints one objective's table."""
    table = Table(title=title(case), caption=f"forward and backward; {machine()}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "contender" else "right")
    for cells in rows(results):
        table.add_row(*cells)
    Console(width=140).print(table)


def markdown(cases: list[Case], results: list[list[Result]]) -> str:
    """All tables with the machine and the meaning of the columns."""
    parts = [
        "# Loss, forward and backward",
        "",
        f"{machine()}. Commit {commit()}.",
        "",
        "Errors are relative L2 against fp64. The floor is the four bare matrix products on the same "
        "tensors, interleaved with the contenders (ABBA). Extra memory is the peak beyond the inputs, "
        "gradients included, each contender in a process of its own. On a shared machine read the ratios, "
        "not the seconds.",
    ]
    for case, group in zip(cases, results, strict=True):
        parts += ["", f"## {title(case)}", "", "| " + " | ".join(COLUMNS) + " |"]
        parts.append("|---|" + "---:|" * (len(COLUMNS) - 1))
        parts += ["| " + " | ".join(cells) + " |" for cells in rows(group)]
    return "\n".join(parts) + "\n"


def write(folder: Path, cases: list[Case], results: list[list[Result]]) -> None:
    """results.json and results.md in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = [
        {"case": case.as_dict(), "results": [vars(result) for result in group]}
        for case, group in zip(cases, results, strict=True)
    ]
    record: dict[str, Any] = {"machine": machine(), "commit": commit(), "groups": groups}
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(cases, results))


def machine() -> str:
    """Processor, threads and versions."""
    return (
        f"{_processor()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, opsd_kernels {opsd_kernels.__version__}"
    )


def commit() -> str:
    """Short hash of the checkout, marked if it had changes; "unknown" outside one."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return result.stdout.strip() or "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()

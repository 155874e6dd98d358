"""compute-sanitizer over one small call of each backend: no bad access, no race in shared memory."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from bench.gpu_check.setting import Check, Setting, Skip, per_backend

TOOLS = ("memcheck", "racecheck")
FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
PROGRAM = """
import torch
import opsd_kernels
h = torch.randn(9, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
w = torch.randn(1009, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
for reduction in ("mean", "none"):
    options = dict(objective="jsd", reduction=reduction, backend={backend!r})
    value = opsd_kernels.loss(h, h.detach() * 0.9, w, **options)
    value.sum().backward()
torch.cuda.synchronize()
print("finite", bool(torch.isfinite(h.grad).all() and torch.isfinite(w.grad).all()))
"""


def checks(setting: Setting) -> list[Check]:
    """Each tool over each backend, memcheck first."""

    def build(backend: str) -> list[Check]:
        return [
            Check(f"{backend}, {tool}", partial(_run, setting, backend, tool), group=backend, limit=600)
            for tool in TOOLS
        ]

    return per_backend(setting, build)


def find_tool() -> str | None:
    """compute-sanitizer on PATH, under the CUDA folder, or in NVIDIA's Python packages."""
    folders = [os.environ.get("CUDA_HOME", ""), *FOLDERS]
    found = shutil.which("compute-sanitizer")
    for folder in folders:
        for path in (Path(folder) / "compute-sanitizer", Path(folder) / "bin" / "compute-sanitizer"):
            if found is None and folder and path.is_file() and os.access(path, os.X_OK):
                found = str(path)
    for name in (
        "nvidia-cuda-sanitizer-api",
        "nvidia-cuda-sanitizer-api-cu12",
        "nvidia-cuda-sanitizer-api-cu13",
    ):
        if found is None:
            found = _in_package(name)
    return found


def _in_package(name: str) -> str | None:
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [str(file.locate()) for file in files if file.name == "compute-sanitizer"]
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def _run(setting: Setting, backend: str, tool: str) -> str:
    sanitizer = find_tool()
    if sanitizer is None:
        raise Skip("no compute-sanitizer on PATH or under the CUDA folder")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
    command += [sys.executable, "-c", PROGRAM.format(backend=backend)]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    seconds = max(setting.left / (1 if tool == TOOLS[-1] else 2) - 1, 1)
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Skip(f"killed after {seconds:.0f} s") from error
    return verdict_of(result.returncode, result.stdout + result.stderr)


def verdict_of(status: int, text: str) -> str:
    """What the tool's output says: numbers, or `Skip` where the tool itself could not run.

    Raises:
        AssertionError: the tool found errors, or the program failed under it.
    """
    summary = re.search(r"(ERROR|RACECHECK) SUMMARY: .*", text)
    if summary is None:
        raise Skip(f"the tool gave no summary, status {status}: {' '.join(text.split())[-200:]}")
    found = re.findall(r"^=+ (?!COMPUTE|.*SUMMARY)(\S.*)", text, flags=re.MULTILINE)
    first = "; ".join(found[:2])
    assert re.search(r": 0 (errors|hazards)", summary.group()), f"{summary.group()}: {first}"
    assert status == 0, f"status {status}: {' '.join(text.split())[-200:]}"
    assert "finite True" in text, "a gradient is not finite"
    return summary.group()

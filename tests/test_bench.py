"""The benchmarks run, measure what they say, and tell a bad kernel from a good one."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python from the root, with Triton's compiler instead of its interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_quick_benchmark_writes_numbers(tmp_path: Path) -> None:
    result = python("-m", "bench", "--quick", "--objectives", "opsd", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (group,) = json.loads((tmp_path / "results.json").read_text())["groups"]
    by_name = {line["contender"]: line for line in group["results"]}
    assert set(by_name) >= {"bare matrix products", "eager PyTorch, full logits", "opsd_kernels"}
    logits = 256 * 8192 * 4
    eager, ours = by_name["eager PyTorch, full logits"], by_name["opsd_kernels"]
    assert eager["extra_bytes"] > 4 * logits  # both logits, both log-softmaxes, at the least
    assert 0 < ours["dh_error"] < 1e-4
    assert 0 < ours["dw_error"] < 1e-4
    assert "| opsd_kernels |" in (tmp_path / "results.md").read_text()

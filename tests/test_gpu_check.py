"""The GPU check on a CPU: its verdicts, its faults found, its report after a crash, a hang and a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_check import rule, supervisor
from bench.gpu_check.report import FAIL, PASS, SKIP, Report
from bench.gpu_check.setting import Skip
from bench.gpu_check.stages import fuzz
from bench.gpu_check.stages.sanitizer import verdict_of

ROOT = Path(__file__).parents[1]
NEEDS_CUDA = {"large", "capture", "sync", "sanitizer", "benchmark"}


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command, with the root and its packages to be found."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "bench.gpu_check", "--out", str(out), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def verdicts(out: Path) -> list[dict[str, Any]]:
    """The lines of the report but the last, which says how the run ended."""
    lines = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    return [line for line in lines if "end" not in line]


def test_every_stage_says_what_it_found(tmp_path: Path) -> None:
    process = start(tmp_path, "--device", "cpu", "--minutes", "4")
    output, _ = process.communicate(timeout=280)
    found = verdicts(tmp_path)
    assert {line["stage"] for line in found} == {stage.name for stage in supervisor.STAGES}
    for line in found:
        assert f"{line['verdict']}  {line['stage']}: {line['what']}" in output
        if line["stage"] in NEEDS_CUDA:
            assert line["verdict"] == SKIP
            assert line["numbers"].startswith("needs a CUDA device")
    wrong = [line for line in found if line["verdict"] == FAIL]
    assert not wrong
    assert process.returncode == 0
    right = {(line["stage"], line["what"]) for line in found if line["verdict"] == PASS}
    for backend in ("torch", "triton"):
        assert ("conformance", f"{backend}, opsd, bf16: V 1, 7, 97") in right
        assert ("repeat", f"{backend}, mean, 3 repeats") in right
        assert ("autocast", f"{backend}, mean, fp32 hidden states") in right
        assert ("fuzz", backend) in right
    table = (tmp_path / "report.md").read_text()
    assert table.count(f"\n| {PASS} |") == len(right)
    assert "\nfinished: " in table


def test_planted_faults_are_found(tmp_path: Path) -> None:
    process = start(tmp_path, "--device", "cpu", "--self-test", "--stages", "repeat", "fuzz")
    output, _ = process.communicate(timeout=120)
    found = [line for line in verdicts(tmp_path) if not line["numbers"].startswith("backend:")]
    assert {line["stage"] for line in found} == {"repeat", "fuzz"}
    assert all(line["verdict"] == FAIL for line in found), output
    assert process.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_a_report(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, "--device", "cpu", "--stages", "environment", "conformance")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.1)
        report = tmp_path / "report.jsonl"
        if report.exists() and report.read_text().count("conformance") >= 2:
            break
    process.send_signal(number)
    process.communicate(timeout=30)
    found = verdicts(tmp_path)
    assert sum(line["stage"] == "conformance" for line in found) >= 2
    table = (tmp_path / "report.md").read_text()
    assert table.count(f"\n| {PASS} |") == sum(line["verdict"] == PASS for line in found)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert f"stopped by {number.name}" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_an_exit_status_of_its_own(tmp_path: Path) -> None:
    process = start(tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "no CUDA device" in output


def test_a_crash_and_a_hang_cost_one_check_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad_stage.py").write_text("""
import os, signal, time
from bench.gpu_check.setting import Check, Skip

def skip():
    raise Skip("not here")

def wrong():
    raise RuntimeError("broken")

def checks(setting):
    return [
        Check("before", lambda: "fine"),
        Check("crash", lambda: os.kill(os.getpid(), signal.SIGSEGV)),
        Check("hang", lambda: time.sleep(100), limit=1.0),
        Check("wrong", wrong),
        Check("skip", skip),
        Check("slow", lambda: time.sleep(100)),
        Check("never", lambda: "fine"),
    ]
""")
    (tmp_path / "fakes").mkdir()
    (tmp_path / "bad_stage.py").rename(tmp_path / "fakes" / "bad_stage.py")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "python")]))
    report = Report(tmp_path)
    stage = supervisor.Stage("bad_stage", 1, package="fakes")
    supervisor.run(supervisor.Plan("cpu", tmp_path, (stage,), seconds=25), report)
    found = {line["what"]: line for line in verdicts(tmp_path)}
    assert [line["verdict"] for line in found.values()] == [PASS, FAIL, FAIL, FAIL, SKIP, SKIP]
    assert "status -11" in found["crash"]["numbers"]
    assert found["hang"]["numbers"].startswith("no result after 1 s")
    assert found["wrong"]["numbers"] == "RuntimeError: broken"
    assert "time is spent" in found["slow"]["numbers"]
    assert report.failed


def test_the_rule_tells_luck_from_wrong() -> None:
    expected = torch.linspace(1, 2, 50, dtype=torch.float64)
    eager = expected + 1e-4 * torch.where(torch.arange(50) % 2 == 0, 1.0, -1.0)
    rule.accurate("x", expected + 1e-4, expected, eager, "torch")
    with pytest.raises(rule.Unlucky, match="x: error 3"):
        rule.accurate("x", expected + 3e-4, expected, eager, "torch")
    for wrong in (expected + 6e-4, expected * torch.nan, expected[:3]):
        with pytest.raises(AssertionError) as caught:
            rule.accurate("x", wrong, expected, eager, "torch")
        assert not isinstance(caught.value, rule.Unlucky)


def test_logits_of_two_bytes_have_bounds_of_their_own() -> None:
    expected = torch.linspace(1, 2, 50, dtype=torch.float64)
    rule.accurate("dx", expected * 1.005, expected, expected, "triton_paired")
    rule.accurate("loss", expected * 1.0005, expected, expected, "triton_paired")
    for name, wrong in (("dx", expected * 1.02), ("loss", expected * 1.01), ("dx", expected * torch.nan)):
        with pytest.raises(AssertionError, match=f"{name}: "):
            rule.accurate(name, wrong, expected, expected, "triton_paired")


def test_a_backend_that_refuses_every_random_case_has_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(case: object, backend: str) -> None:
        raise ValueError("backend: expected another one")

    monkeypatch.setattr(fuzz, "case_accurate", refuse)
    monkeypatch.setattr(fuzz, "draw", lambda *seeds: (None, "a case"))
    with pytest.raises(Skip, match="refused all 1 cases"):
        fuzz._fuzz(None, "triton", 0.0)  # type: ignore[arg-type]


def test_an_unlucky_check_has_to_pass_at_two_more_seeds() -> None:
    def check(seed: int) -> str:
        if seed in unlucky:
            raise rule.Unlucky(f"seed {seed}")
        return "right"

    unlucky: set[int] = set()
    assert rule.over_seeds(check) == "right"
    unlucky.add(0)
    assert "narrowly off at seed 0" in rule.over_seeds(check)
    unlucky.add(2)
    with pytest.raises(rule.Unlucky, match="seed 2"):
        rule.over_seeds(check)


def test_what_the_sanitizer_says() -> None:
    good = "========= COMPUTE-SANITIZER\nfinite True\n========= ERROR SUMMARY: 0 errors\n"
    assert verdict_of(0, good) == "ERROR SUMMARY: 0 errors"
    bad = "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
    with pytest.raises(AssertionError, match=r"1 error: Invalid __global__ read"):
        verdict_of(1, bad + "========= ERROR SUMMARY: 1 error\n")
    races = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    with pytest.raises(AssertionError, match="2 hazards"):
        verdict_of(1, races)
    with pytest.raises(AssertionError, match="not finite"):
        verdict_of(0, good.replace("True", "False"))
    with pytest.raises(Skip, match="no summary"):
        verdict_of(1, "Error: this driver is not supported")

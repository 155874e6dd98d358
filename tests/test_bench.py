"""The benchmarks run, measure what they say, and tell a bad kernel from a good one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__ as program
from bench import memory, plots, tables, timing
from bench.cases import Case, Inputs
from bench.contenders import EAGER, ENGINE, Contender
from bench.measure import Group, Settings, is_rejected, run
from bench.timing import Drift, Times
from bench_samples import (
    TINY,
    YARDSTICKS,
    fabricated,
    named,
    no_gradient,
    spoiled,
    without_mask,
    wrong_gradient,
    wrong_value,
)

ROOT = Path(__file__).parents[1]
FAST = Settings(rounds=1, memory=False)


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
    assert "fla KL (does not compute opsd)" in " ".join(result.stdout.split())
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize("spoil", [wrong_value, wrong_gradient, no_gradient])
def test_a_wrong_contender_of_ours_is_found(spoil: object, capsys: pytest.CaptureFixture[str]) -> None:
    group = run(TINY, FAST, [*YARDSTICKS, named(ENGINE), spoiled("spoiled", spoil)])  # type: ignore[arg-type]
    assert [result.contender for result in group.wrong] == ["spoiled"]
    assert program._verdict([group]) == 1
    assert "WRONG spoiled, forward_kl" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", [wrong_value, wrong_gradient])
def test_a_wrong_peer_is_marked_and_fails_nothing(spoil: object) -> None:
    group = run(TINY, FAST, [*YARDSTICKS, spoiled("peer", spoil, ours=False)])  # type: ignore[arg-type]
    assert not group.wrong
    peer = group.results[-1]
    assert peer.remarks
    assert peer.seconds
    assert peer.remarks[0] in tables.markdown({"device": "x"}, [group])


def test_a_contender_that_ignores_the_mask_is_found() -> None:
    masked = replace(TINY, masked=0.5)
    group = run(masked, FAST, [*YARDSTICKS, named(ENGINE), Contender("all rows", without_mask, ours=True)])
    assert [result.contender for result in group.wrong] == ["all rows"]
    assert "another loss" in group.wrong[0].remarks[0]


def test_what_is_missing_or_fails_is_named() -> None:
    def refuses(inputs: Inputs, case: Case) -> torch.Tensor:
        raise TypeError("no such option")

    def breaks(inputs: Inputs, case: Case) -> torch.Tensor:
        raise RuntimeError("kernel error")

    def runs_out(inputs: Inputs, case: Case) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    bad = [
        Contender("absent", refuses, package="no_such_package"),
        Contender("GPU alone", refuses, cuda_only=True),
        Contender("unclipped", refuses, objectives=frozenset({"opsd"})),
        Contender("new option", refuses, ours=True, optional=True),
        Contender("broken peer", breaks),
        Contender("broken", breaks, ours=True, optional=True),
        Contender("large", runs_out),
    ]
    group = run(TINY, FAST, [*YARDSTICKS, *bad])
    assert group.left_out == {
        "absent": "the package no_such_package is not installed",
        "GPU alone": "cannot run on a CPU",
        "unclipped": "does not compute forward_kl",
        "new option": "not available here: TypeError: no such option",
        "broken peer": "failed: RuntimeError: kernel error",
    }
    assert [result.contender for result in group.wrong] == ["broken"]
    assert group.results[-1].remarks == ["out of memory"]
    text = tables.markdown({"device": "x"}, [group])
    assert "absent (the package no_such_package is not installed)" in text
    assert "FAILED: RuntimeError: kernel error" in text


def test_a_failure_after_the_times_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(contender: Contender, case: Case) -> None:
        raise RuntimeError("the process ended with code 1: kernel error")

    monkeypatch.setattr(memory, "peak_on_cpu", fails)
    group = run(TINY, Settings(rounds=1), [*YARDSTICKS, named(ENGINE)])
    assert all(result.seconds for result in group.results)
    assert [result.contender for result in group.wrong] == [ENGINE]
    assert group.wrong[0].remarks == ["memory: RuntimeError: the process ended with code 1: kernel error"]


def test_contenders_alternate_and_the_floor_frames_them(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    made_up = iter([1.0, 1.0, *[1.0] * 8, 1.05, 1.05])

    class Watch:
        def __init__(self, device: str) -> None:
            pass

        def __call__(self, call: object, times: Times) -> None:
            call()  # type: ignore[operator]
            times.seconds.append(next(made_up))

    monkeypatch.setattr(timing, "Stopwatch", Watch)
    calls = {name: lambda name=name: called.append(name) for name in "fab"}
    calls["c"] = lambda: called.append("c")
    times, drift = timing.interleaved(calls, "f", 1, "cpu")  # type: ignore[arg-type]
    assert "".join(called) == "ff" + "fabccbaf" + "ff"
    assert {name: len(one.seconds) for name, one in times.items()} == dict.fromkeys("fabc", 2)
    assert drift.share == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("drift", "device", "keep", "rejected"),
    [
        (0.03, "cuda", False, True),
        (-0.03, "cuda", False, True),
        (float("nan"), "cuda", False, True),
        (0.019, "cuda", False, False),
        (0.03, "cuda", True, False),
        (0.5, "cpu", False, False),
    ],
)
def test_a_gpu_that_drifted_is_rejected(drift: float, device: str, keep: bool, rejected: bool) -> None:
    assert is_rejected(Drift(1.0, 1.0 + drift), device, keep) is rejected


def test_a_drifting_machine_gets_a_second_chance() -> None:
    drifts = [Drift(1.0, 1.1), Drift(1.0, 1.01), Drift(1.0, 1.0)]
    measured = iter([({"n": Times([float(i)])}, drift) for i, drift in enumerate(drifts)])
    times, drift = timing.until_steady(lambda: next(measured), 2)
    assert (times["n"].seconds, drift) == ([1.0], drifts[1])
    measured = iter([({}, Drift(1.0, 1.1)), ({}, Drift(1.0, 1.2))])
    assert timing.until_steady(lambda: next(measured), 2)[1].after == 1.2


def test_a_rejected_case_is_told_and_drift_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    group = fabricated(drift=0.04, rejected=True)
    assert program._verdict([fabricated(), group]) == 3
    assert "drifted by +4.0%" in capsys.readouterr().out
    assert "above 2 %: REJECTED" in tables.markdown({"device": "x"}, [group])
    assert "read times with care" in tables.markdown({"device": "x"}, [fabricated(drift=0.04)])


def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk = tmp_path / "results.json"

    def measured(case: Case, *rest: object) -> Group:
        if case.objective == "jsd":  # the case before is there already: a kill would not have lost it
            assert len(json.loads(on_disk.read_text())["groups"]) == 1
            raise KeyboardInterrupt
        return fabricated(case)

    monkeypatch.setattr(program, "run", measured)
    command = ["--quick", "--device", "cpu", "--objectives", "opsd", "jsd", "--out", str(tmp_path)]
    assert program.main(command) == 130
    (group,) = json.loads(on_disk.read_text())["groups"]
    assert group["case"]["objective"] == "opsd"
    assert "## opsd" in (tmp_path / "results.md").read_text()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".png", ".png"]


@pytest.mark.parametrize("limit", [100, 256, 257, 1000, 5000, 70_000, 10**9])
def test_the_search_finds_the_largest_n(limit: int) -> None:
    asked: list[int] = []

    def fits(rows: int) -> bool:
        asked.append(rows)
        return rows <= limit

    found = memory.search(fits)
    assert len(asked) < 20
    if limit < memory.SMALLEST:
        assert found == 0
    else:
        bound = min(limit, memory.LARGEST)
        assert bound * (1 - 1 / memory.PRECISION) - 1 <= found <= bound


@pytest.mark.slow
def test_a_memory_limit_is_found_on_a_cpu() -> None:
    case = replace(TINY, vocab=65536)
    limit = 2**30
    assert memory._fits_process(named(EAGER), case, limit)
    assert not memory._fits_process(named(EAGER), replace(case, rows=2048), limit)


def test_plots_of_several_objectives_and_gaps(tmp_path: Path) -> None:
    cases = [replace(TINY, objective=name, gap=gap) for name in ("jsd", "opsd") for gap in (1.0, 0.1)]
    groups = [fabricated(case).as_dict() for case in cases] + [fabricated(replace(TINY, rows=64)).as_dict()]
    written = plots.draw(groups, tmp_path)
    assert len(written) == 4
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)

"""An evaluation that takes longer than it may is given up on all ranks; the run says so and goes on."""

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from driver_tiny import tiny_config, tiny_trainer
from opsd_train.report.page import write_report
from opsd_train.safety import stops
from opsd_train.safety.deadline import OutOfTime, is_over, within
from opsd_train.train import run
from opsd_train.watch.record import load_run

AT_ONCE = 1e-9  # seconds
ABOUT = {"name": "n", "model": "m"}


def ran(out: Path, console: Console, **settings: Any) -> list[torch.Tensor]:
    """The weights after two steps."""
    torch.manual_seed(0)
    trainer = tiny_trainer(out, max_steps=2, eval_strategy="steps", eval_steps=1, **settings)
    run(trainer, ABOUT, console)
    return list(trainer.student.parameters())


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_goes_on_without_its_evaluations(tmp_path: Path, terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal)
    cut = ran(tmp_path / "cut", console, eval_seconds=AT_ONCE)
    found, said = load_run(tmp_path / "cut"), console.file.getvalue()  # type: ignore[attr-defined]
    assert found.evaluations == []
    assert [one["step"] for one in found.info["evaluations_cut_off"]] == [0, 1, 2]  # each is tried once
    assert found.info["ended"]["how"] == "finished"
    for step in (0, 1, 2):
        assert f"warning: the evaluation at step {step} was cut off after 0 s (--eval-seconds)" in said
    page = write_report(tmp_path / "cut").read_text()
    assert "the evaluation at step 2 was cut off after 0 s (--eval-seconds), without result." in page
    whole = ran(tmp_path / "whole", Console(quiet=True))
    assert all(torch.equal(a, b) for a, b in zip(cut, whole, strict=True))  # nothing else was drawn
    assert "evaluations_cut_off" not in load_run(tmp_path / "whole").info


def test_one_in_time_is_as_it_was(tmp_path: Path) -> None:
    for out, seconds in (("none", 0.0), ("long", 1000.0)):
        ran(tmp_path / out, Console(quiet=True), eval_seconds=seconds)
    none, long = (load_run(tmp_path / out).evaluations for out in ("none", "long"))
    assert none == long
    assert len(none) == 3


def test_a_resumed_run_keeps_what_was_cut_off(tmp_path: Path) -> None:
    ran(tmp_path, Console(quiet=True), eval_seconds=AT_ONCE, save_strategy="steps", save_steps=1)
    trainer = tiny_trainer(
        tmp_path, max_steps=3, resume_from_checkpoint=str(tmp_path / "checkpoint-1"), save_strategy="no"
    )
    run(trainer, ABOUT, Console(quiet=True), existing="resume")
    found = load_run(tmp_path)
    assert [one["step"] for one in found.info["evaluations_cut_off"]] == [0, 1]
    assert [one["step"] for one in found.evaluations] == [3]


@pytest.mark.parametrize(("others", "error"), [(0, None), (stops.LATE, OutOfTime), (15, stops.Stopped)])
def test_ranks_leave_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: int, error: type[Exception] | None
) -> None:
    """What another rank says counts here too, and a signal before a deadline."""
    monkeypatch.setattr(stops._Watch, "_many", lambda self: True)
    monkeypatch.setattr(stops._Watch, "most", lambda self, own: max(own, others))
    monkeypatch.setattr(stops._Watch, "heard", lambda self: None)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: None)
    monkeypatch.setattr(stops._Watch, "is_common", lambda self, raised: False)

    def write() -> str:
        with stops.agreed():
            pass
        return "written"

    trainer = tiny_trainer(tmp_path)
    if error is None:
        with stops.watched(trainer):
            assert write() == "written"
    else:
        with pytest.raises(error), stops.watched(trainer):
            write()


def test_a_signal_counts_before_a_deadline(tmp_path: Path) -> None:
    def both() -> None:
        with stops.watched(tiny_trainer(tmp_path)), within(AT_ONCE), stops.agreed():
            os.kill(os.getpid(), signal.SIGTERM)
            stops.check()

    with pytest.raises(stops.Stopped):
        both()
    assert not is_over()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_seconds": -1.0}, "eval_seconds: expected a number at least 0, got -1"),
        (
            {"eval_seconds": 5.0, "metric_for_best_model": "greedy_accuracy"},
            "eval_seconds: expected 0 with metric_for_best_model, .*; got 5",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **settings)

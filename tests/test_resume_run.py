"""Whole runs that go on: from an earlier checkpoint, by mistake, before the first one, after errors."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model, tiny_trainer
from opsd_train.engines.base import EngineError
from opsd_train.engines.hf import HFEngine
from opsd_train.report.page import banner, write_report
from opsd_train.run_folder import Existing, check_output
from opsd_train.run_options import RunOptions
from opsd_train.safety import stops
from opsd_train.safety.checkpoints import newest_checkpoint
from opsd_train.safety.keep import BadSteps
from opsd_train.safety.lock import LOCK, FolderLock
from opsd_train.train import run, train
from opsd_train.trainer import OPSDTrainer
from opsd_train.watch.record import load_run
from poison import poison

SETTINGS: dict[str, Any] = {
    "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "rollouts_recorded": 0, "max_steps": 6,
    "max_completion_length": 3, "per_device_train_batch_size": 2,
}  # fmt: skip


def trainer_of(out: Path, **settings: Any) -> OPSDTrainer:
    trainer = tiny_trainer(out, **(SETTINGS | settings))
    trainer.held_out = []
    return trainer


def go(trainer: OPSDTrainer) -> None:
    resumes: Existing = "resume" if trainer.config.resume_from_checkpoint else "error"
    run(trainer, {"name": "n", "model": "m"}, Console(quiet=True), resumes)


def steps_of(out: Path) -> list[float]:
    return [entry["step"] for entry in load_run(out).metrics]


def ended(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())["ended"]


def names(out: Path, pattern: str) -> list[str]:
    return sorted(one.name for one in out.glob(pattern))


class Raises(TrainerCallback):
    """An error, or whatever an action does, in the middle or at the end of a step."""

    def __init__(self, step: int, action: Any, event: str = "on_step_end") -> None:
        self.step, self.action = step, action
        setattr(self, event, self.strike)

    def strike(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def dies() -> None:
    raise RuntimeError("dies")


def test_a_branch_that_is_left_is_not_gone_on_with(tmp_path: Path) -> None:
    go(trainer_of(tmp_path, save_completions_every=2))
    assert ended(tmp_path) == {"how": "finished", "step": 6, "of": 6}
    abandoned = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    again = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2"), "save_completions_every": 4}
    branch = trainer_of(tmp_path, learning_rate=0.1, seed=3, **again)
    branch.add_callback(Raises(5, dies))
    with pytest.raises(RuntimeError, match="dies"):
        go(branch)
    assert Path(newest_checkpoint(tmp_path)).name == "checkpoint-4"
    assert names(tmp_path, "*checkpoint-*") == [
        "checkpoint-2", "checkpoint-4", "superseded-checkpoint-4", "superseded-checkpoint-6",
    ]  # fmt: skip
    assert names(tmp_path, "completions/*") == ["step-000002.parquet", "step-000004.parquet"]
    assert names(tmp_path, "superseded-completions/*") == ["step-000004.parquet", "step-000006.parquet"]
    kept = load_file(tmp_path / "superseded-checkpoint-6" / "model.safetensors")
    assert all(torch.equal(kept[name], abandoned[name]) for name in kept)
    assert ended(tmp_path) == {"how": "failed", "step": 5, "of": 6, "why": "RuntimeError: dies"}
    last = trainer_of(tmp_path, **again | {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")})
    go(last)
    assert names(tmp_path, "superseded-checkpoint-4*") == [
        "superseded-checkpoint-4", "superseded-checkpoint-4.2",
    ]  # fmt: skip


def test_a_stop_keeps_its_own_step_and_not_another_run_s(tmp_path: Path) -> None:
    """A folder of that name proves nothing: it may be what an earlier run left."""
    tiny_trainer(tmp_path, **SETTINGS).train()
    fresh = tiny_trainer(tmp_path, **SETTINGS | {"save_steps": 50, "max_steps": 9, "learning_rate": 0.05})
    fresh.add_callback(Raises(6, lambda: os.kill(os.getpid(), 15), "on_step_begin"))
    with pytest.raises(stops.Stopped, match=r"after step 7"), stops.watched(fresh):
        fresh.train()
    old = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    again = tiny_trainer(tmp_path, **SETTINGS | {"save_steps": 50, "max_steps": 9, "learning_rate": 0.05})
    again.add_callback(Raises(6, lambda: os.kill(os.getpid(), 15), "on_step_end"))
    with (
        pytest.raises(stops.Stopped, match=r"after step 6, which .*checkpoint-6 holds"),
        stops.watched(again),
    ):
        again.train()
    kept, own = load_file(tmp_path / "checkpoint-6" / "model.safetensors"), again.student.state_dict()
    assert all(torch.equal(kept[name], own[name]) for name in kept)
    assert not all(torch.equal(kept[name], old[name]) for name in kept)


def test_a_mistaken_resume_changes_nothing(tmp_path: Path) -> None:
    go(trainer_of(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    wrong = trainer_of(tmp_path, teacher="ema", resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="expected ema_teacher"):
        go(wrong)
    other = tiny_trainer(
        tmp_path,
        tiny_model(hidden_size=16),
        resume_from_checkpoint=str(tmp_path / "checkpoint-2"),
        **SETTINGS,
    )
    with pytest.raises(ValueError, match="this model's weights"):
        go(other)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = RunOptions(model=str(tmp_path / "model"), data=str(rows))

    def prepare(**settings: Any) -> OPSDTrainer:
        return train(options, tiny_config(out, **SETTINGS | settings), Console(quiet=True))

    child = os.fork()
    if child == 0:
        try:
            first = prepare(save_steps=50)
            first.add_callback(Raises(3, lambda: os._exit(9)))
            go(first)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert steps_of(out) == [1, 2]
    with pytest.raises(ValueError, match="holds a run"):
        prepare()
    assert ended(out) is None
    assert str(banner(load_run(out))).startswith("At step 2 when")
    go(prepare(resume_from_checkpoint="last"))
    assert steps_of(out) == [1, 2, 3, 4, 5, 6]
    lines = [
        json.loads(line)["metrics"]["step"] for line in (out / "superseded.jsonl").read_text().splitlines()
    ]
    assert lines == [1, 2]
    assert banner(load_run(out)) is None


class Dies(HFEngine):
    """After so many calls."""

    left = 6  # the first one is a look at what the student writes

    def write(self, *args: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise EngineError("rollouts: died")
        return super().write(*args)


def test_steps_are_kept_when_an_engine_dies(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole", save_steps=50)
    go(whole)
    trainer = trainer_of(tmp_path / "run", save_steps=50)
    trainer.engine = Dies(trainer.student, trainer.vocabulary)
    with pytest.raises(EngineError, match="rollouts: died") as error:
        go(trainer)
    assert error.value.__notes__ == [f"the last complete step is kept in {tmp_path / 'run' / 'checkpoint-5'}"]
    assert ended(tmp_path / "run")["why"] == "EngineError: rollouts: died"
    page = write_report(tmp_path / "run").read_text()
    said = "Failed after step 5 of 6: EngineError: rollouts: died; resume with --resume-from-checkpoint last."
    assert said in page
    resumed = trainer_of(tmp_path / "run", save_steps=50, resume_from_checkpoint="last")
    go(resumed)
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    own = whole.student.state_dict()
    assert all(torch.equal(x, own[name]) for name, x in resumed.student.state_dict().items())


def test_an_error_is_the_one_that_came_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path, save_steps=50)
    trainer.engine = Dies(trainer.student, trainer.vocabulary)
    monkeypatch.setattr(trainer, "_save_checkpoint", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(EngineError, match="died") as error:
        go(trainer)
    assert error.value.__notes__ == ["step 5 could not be saved: full"]


def test_steps_are_kept_when_too_many_were_not_finite(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, save_steps=50, max_bad_steps=2)
    poison(trainer, "loss", [4, 5])
    with pytest.raises(BadSteps, match="2 steps in a row, up to step 5"):
        go(trainer)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["SkippedSteps"]["attributes"] == {"total": 1, "in_a_row": 1}


def test_what_a_resumed_run_says_of_itself(tmp_path: Path) -> None:
    """Its intervals are its own, its clock goes on, and its engine gets the checkpoint's weights."""
    go(trainer_of(tmp_path))
    first, time = json.loads((tmp_path / "run.json").read_text()), load_run(tmp_path).metrics[1]["seconds"]
    first["seconds"] = 1000.0
    (tmp_path / "run.json").write_text(json.dumps(first))
    told: list[int] = []
    trainer = trainer_of(
        tmp_path, save_steps=3, logging_steps=2, resume_from_checkpoint=f"{tmp_path}/checkpoint-2"
    )
    trainer.engine.follow = told.append  # type: ignore[method-assign,assignment]
    trainer.engine_behind = False  # as after an evaluation
    go(trainer)
    assert names(tmp_path, "checkpoint-*") == ["checkpoint-2", "checkpoint-3", "checkpoint-6"]
    assert steps_of(tmp_path) == [1, 2, 4, 6]
    assert told[0] == 2
    info = json.loads((tmp_path / "run.json").read_text())
    assert info["started"] == first["started"]
    assert len(info["resumed"]) == 1
    assert info["seconds"] > 1000
    assert load_run(tmp_path).metrics[2]["seconds"] > time


def test_one_run_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    lock = FolderLock(out)
    child = os.fork()
    if child == 0:
        try:
            FolderLock(out)
        except ValueError as error:
            os._exit(7 if f"a run is going on in {out} (process {os.getppid()} on " in str(error) else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    check_output(out, "error")  # the lock is no run
    lock.release()
    assert not out.exists()
    child = os.fork()
    if child == 0:
        FolderLock(out)
        os._exit(9)
    os.waitpid(child, 0)
    assert (out / LOCK).exists()
    with FolderLock(out):  # its process is gone
        assert f"process {os.getpid()}" in (out / LOCK).read_text()


def test_the_engine_is_closed_and_the_folder_given_back_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.json").write_text("{}")
    trainer, closed = trainer_of(tmp_path), []
    monkeypatch.setattr(trainer.engine, "close", lambda: closed.append(True))
    with pytest.raises(ValueError, match="folder without a run"):
        go(trainer)
    assert closed == [True]
    assert not (tmp_path / LOCK).exists()
    monkeypatch.setattr(trainer.ranks, "index", 1)
    monkeypatch.setattr(trainer.ranks, "any", lambda flag: True)  # as the second of two processes hears of it
    with pytest.raises(RuntimeError, match="the first process failed"):
        trainer.ranks.first(lambda: None)

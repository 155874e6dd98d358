"""A run goes on from a checkpoint bit for bit, and its record has every step once."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerState

from checkpoint_runs import content, go, student
from driver_tiny import tiny_model, tiny_trainer
from opsd_train.safety import stops
from opsd_train.train import run
from opsd_train.trainer import OPSDTrainer
from opsd_train.watch.record import RunRecord, load_run

MATRIX: dict[str, dict[str, Any]] = {
    "adamw, into the second epoch": {},  # four steps an epoch, and the last of the first is a checkpoint
    "schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1},
    "rmsprop": {"optim": "rmsprop"},
    "adafactor in bf16": {"optim": "adafactor", "dtype": torch.bfloat16},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "generations": {"num_generations": 2, "per_device_train_batch_size": 4},
    "lora with dropout": {"lora": True},
}


@pytest.mark.parametrize("name", MATRIX)
def test_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, name: str) -> None:
    steps = 4 if name.startswith("adamw") else 2
    settings = {"max_steps": steps + 1 if steps == 4 else 4, **MATRIX[name]}
    go(tmp_path / "whole", **settings)
    resumed = go(tmp_path / "resumed", tmp_path / "whole" / f"checkpoint-{steps}", **settings)
    assert resumed.state.global_step == settings["max_steps"]
    first, last = (content(tmp_path / "whole" / f"checkpoint-{one}") for one in (1, settings["max_steps"]))
    assert last == content(tmp_path / "resumed" / f"checkpoint-{settings['max_steps']}")
    moved = {"optimizer.safetensors", "scheduler.json", "ema_teacher.safetensors"}
    moved |= {"adapter_model.safetensors" if settings.get("lora") else "model.safetensors"}
    if settings.get("lora"):  # dropout draws
        moved |= {"rank-00000.safetensors"}
    assert all(first[one] != last[one] for one in moved)
    assert {"rank-00000.json", "rank-00000.safetensors", "position.json"} <= last.keys()


def test_losses_between_two_lines_of_the_log_are_kept(tmp_path: Path) -> None:
    given: dict[str, Any] = {"logging_steps": 3, "max_steps": 3, "logging_first_step": False}
    whole = go(tmp_path / "whole", **given)
    resumed = go(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-2", **given)
    losses = [[one["loss"] for one in run.state.log_history if "loss" in one] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1
    last = [run.state.log_history[-1]["train_loss"] for run in (whole, resumed)]
    alone = go(tmp_path / "alone", logging_steps=1, max_steps=3)
    steps = [one["loss"] for one in alone.state.log_history if "loss" in one]
    assert last[0] == pytest.approx(sum(steps) / 3, rel=1e-5)
    assert last[1] == pytest.approx(steps[2], rel=1e-5)  # of the steps of that call


class CutOff(TrainerCallback):
    """Ends a run between the two micro-batches of its third step."""

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_losses_of_a_step_that_was_cut_off_are_not_kept(tmp_path: Path) -> None:
    settings = {**MATRIX["accumulation"], "teacher": "live", "max_steps": 3, "logging_steps": 3}
    whole = go(tmp_path / "whole", **settings)
    cut = tiny_trainer(tmp_path, tiny_model(), **{**settings, "save_strategy": "steps", "save_steps": 20})
    cut.add_callback(CutOff())
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    cut._save_checkpoint(cut.model, None)
    resumed = go(tmp_path / "resumed", tmp_path / "checkpoint-2", **settings)
    losses = [[one["loss"] for one in run.state.log_history if "loss" in one] for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_resuming_a_run_that_is_over_changes_nothing(tmp_path: Path) -> None:
    go(tmp_path, max_steps=3)
    before = content(tmp_path / "checkpoint-3")
    resumed = go(tmp_path, tmp_path / "checkpoint-3", max_steps=3)
    assert resumed.state.global_step == 3
    resumed.save_model(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == before["model.safetensors"]


def test_checkpoint_of_another_model_or_run(tmp_path: Path) -> None:
    go(tmp_path, max_steps=1, teacher="live", per_device_train_batch_size=8)
    checkpoint = tmp_path / "checkpoint-1"
    other = tiny_trainer(tmp_path, tiny_model(hidden_size=16), teacher="live")
    with pytest.raises(
        ValueError, match=r"this model's weights; .*\(32, 32\) there and \(32, 16\) in the model"
    ):
        other.train(checkpoint)
    with pytest.raises(ValueError, match=r"expected .*adapter_model.safetensors for adapters; got none"):
        tiny_trainer(tmp_path, student(True, 0), teacher="live").train(checkpoint)
    with pytest.warns(UserWarning, match="other rows: seed 7, not 42; rollouts_per_step 4, not 8"):
        go(tmp_path, checkpoint, max_steps=1, teacher="live", seed=7, per_device_train_batch_size=4)


def test_metrics_of_a_resumed_run_have_every_step_once(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    for step in range(1, 6):
        record.log(step, {"loss": float(step)})
    correct = {"correct": 1, "total": 2, "accuracy": 0.5, "low": 0.1, "high": 0.9}
    for step in (0, 3, 5):
        record.add_evaluation({"step": step, "greedy": correct, "sampled": correct})  # type: ignore[typeddict-item]
    again = RunRecord(tmp_path, "resume")
    again.rewind(3)
    again.rewind(3)
    assert [one["step"] for one in load_run(tmp_path).metrics] == [1, 2, 3]
    again.log(4, {"loss": 40.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(one["step"], one["loss"]) for one in lines] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [one["step"] for one in load_run(tmp_path).evaluations] == [0, 3]
    dropped = [json.loads(line) for line in (tmp_path / "superseded.jsonl").read_text().splitlines()]
    assert [one["metrics"]["step"] for one in dropped[:2]] == [4, 5]
    assert dropped[2]["evaluations"]["step"] == 5
    assert len(dropped) == 3


@pytest.mark.parametrize("spared", [False, True])
def test_an_evaluation_that_a_signal_prevented_is_made_up_for(tmp_path: Path, spared: bool) -> None:
    """The signal comes in the evaluation, or in the step before, which then leaves it out."""

    def trainer_of(out: Path, **more: Any) -> OPSDTrainer:
        settings = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "rollouts_recorded": 1}
        return tiny_trainer(out, tiny_model(), **settings, **more)

    def evaluations(out: Path) -> Any:
        return json.loads((out / "evaluations.json").read_text())

    console, about = Console(quiet=True), {"name": "n", "model": "m"}
    run(trainer_of(tmp_path / "whole"), about, console)
    trainer, out = trainer_of(tmp_path / "cut"), tmp_path / "cut"
    strikes = "get_batch_samples" if spared else "evaluate"
    method = getattr(trainer, strikes)

    def struck(*args: Any, **kwargs: Any) -> Any:
        found = method(*args, **kwargs) if spared else None
        if trainer.state.global_step == 2 - spared:
            os.kill(os.getpid(), signal.SIGTERM)
        return found if spared else method(*args, **kwargs)

    setattr(trainer, strikes, struck)
    with pytest.raises(stops.Stopped, match="after step 2"):
        run(trainer, about, console)
    assert [one["step"] for one in evaluations(out)] == [0]
    resumed = trainer_of(out, resume_from_checkpoint="last")
    run(resumed, about, console, existing="resume")
    assert evaluations(out) == evaluations(tmp_path / "whole")
    assert [one["step"] for one in evaluations(out)] == [0, 2, 4]
    models = [(one / "model" / "model.safetensors").read_bytes() for one in (out, tmp_path / "whole")]
    assert models[0] == models[1]
    again = trainer_of(out, resume_from_checkpoint=str(out / "checkpoint-2"))
    evaluated, evaluate = [], again.evaluate

    def counted(*args: Any, **kwargs: Any) -> Any:
        evaluated.append(again.state.global_step)
        return evaluate(*args, **kwargs)

    again.evaluate = counted  # type: ignore[method-assign]
    run(again, about, console, existing="resume")
    assert evaluated == [4]  # what is known of step 2 is not done again

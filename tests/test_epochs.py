"""A run whose length is told in epochs: every prompt so often, steps that everybody knows, exact resuming."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from driver_tiny import tiny_config, tiny_trainer
from opsd_train.commands.options import parse
from opsd_train.config import OPSDConfig
from opsd_train.train import run
from opsd_train.trainer import OPSDTrainer

EPOCHS: dict[str, Any] = {"max_steps": -1, "max_completion_length": 2, "per_device_train_batch_size": 2}


def read_by(trainer: OPSDTrainer) -> Counter[str]:
    """How often each prompt is read while the trainer trains."""
    read: Counter[str] = Counter()
    roll_out = trainer.roll_out

    def watching(prompts: Any, sampling: Any, stream: Any) -> Any:
        read.update(prompt.where for prompt in prompts)
        return roll_out(prompts, sampling, stream)

    trainer.roll_out = watching  # type: ignore[method-assign]
    trainer.train()
    return read


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"num_train_epochs": 2}, 8),  # 8 rows, 2 a step
        ({"num_train_epochs": 2, "gradient_accumulation_steps": 3}, 4),  # 6 and the 2 that are left
        ({"num_train_epochs": 1, "num_generations": 2, "per_device_train_batch_size": 4}, 4),
    ],
)
def test_every_prompt_is_read_as_often_as_told(tmp_path: Path, settings: dict, steps: int) -> None:
    trainer = tiny_trainer(tmp_path, **(EPOCHS | settings))
    assert trainer.args.max_steps == steps
    read = read_by(trainer)
    times = settings["num_train_epochs"] * settings.get("num_generations", 1)
    assert dict(read) == {prompt.where: times for prompt in trainer.prompts}
    assert (trainer.state.global_step, trainer.state.max_steps) == (steps, steps)
    assert trainer.state.epoch == settings["num_train_epochs"]
    assert set(trainer.lr_scheduler.get_last_lr()) == {0.0}  # the schedule ends where the run does


def test_half_an_epoch_is_half_of_its_steps(tmp_path: Path) -> None:
    assert tiny_trainer(tmp_path, **EPOCHS, num_train_epochs=0.5).args.max_steps == 2


def test_a_run_of_epochs_is_recorded_and_resumed_exactly(tmp_path: Path) -> None:
    settings = EPOCHS | {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 3}
    for name, resume in (("whole", None), ("cut", None), ("cut", "last")):
        trainer = tiny_trainer(tmp_path / name, **settings, resume_from_checkpoint=resume)
        trainer.held_out = []
        existing = "error" if resume is None else "resume"
        run(trainer, {"name": "n", "model": "m"}, Console(quiet=True), existing)  # type: ignore[arg-type]
        if (name, resume) == ("cut", None):
            (tmp_path / name / "checkpoint-4").rename(tmp_path / "later")  # as if cut off after step 3
    info = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert info["ended"] == {"how": "finished", "step": 4, "of": 4}
    assert (info["config"]["num_train_epochs"], info["config"]["max_steps"]) == (1, 4)
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train_epochs": 1, "max_steps": 3}, "num_train_epochs: expected none with max_steps 3; got 1"),
        ({"num_train_epochs": -1}, "num_train_epochs: expected a number at least 0"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs: expected a number at least 0"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs: expected a number below inf"),
        ({"max_steps": 0}, "max_steps: expected a number of at least 1, got 0"),
        (
            {"num_train_epochs": 1, "private": {"clip": 1.0, "noise": 1.0, "delta": 1e-5}},
            "num_train_epochs: expected none with private",
        ),
    ],
)
def test_lengths_that_are_none(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **({"max_steps": -1} | settings))


def test_a_hundred_steps_if_nothing_is_said(tmp_path: Path) -> None:
    assert tiny_config(tmp_path, max_steps=-1).max_steps == 100


@pytest.mark.parametrize(
    ("file", "words", "expected"),
    [
        ("max_steps: 7", ["--num-train-epochs", "2"], (-1, 2)),
        ("num_train_epochs: 2", ["--max-steps", "7"], (7, 0)),
        ("num_train_epochs: 2", [], (-1, 2)),
    ],
)
def test_the_later_of_steps_and_epochs_counts(
    tmp_path: Path, file: str, words: list[str], expected: tuple[int, float]
) -> None:
    (tmp_path / "run.yaml").write_text(f"use_cpu: true\n{file}\n")
    given = [f"--output_dir={tmp_path}"]
    (config,) = parse([OPSDConfig], [tmp_path / "run.yaml"], words, given)
    assert (config.max_steps, config.num_train_epochs) == expected

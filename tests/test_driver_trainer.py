"""What the trainer refuses, resumes from and counts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from driver_tiny import tiny_config, tiny_model, tiny_prompts, tiny_trainer
from opsd_train.backbone import check_positions
from opsd_train.config import OPSDConfig
from opsd_train.rollouts import collate
from opsd_train.trainer import OPSDTrainer
from opsd_train.watch import meter
from opsd_train.watch.inspection import inspect_rollouts


def test_resuming_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"expected a checkpoint in {folder}, found none"):
            tiny_trainer(folder).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("how", ["newest", "path", "text"])
def test_resuming_takes_the_teacher_along(tmp_path: Path, how: str) -> None:
    tiny_trainer(tmp_path, teacher="ema", max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    trainer = tiny_trainer(tmp_path, teacher="ema", max_steps=1)
    loaded: list[str] = []
    trainer.teacher.load = loaded.append
    trainer.train({"newest": True, "path": checkpoint, "text": str(checkpoint)}[how])
    assert loaded == [str(checkpoint)]
    assert trainer.state.global_step == 1


def test_tokens_per_second_are_those_of_the_steps_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    roll_out = OPSDTrainer.roll_out

    def slow(trainer: OPSDTrainer, prompts: Any, sampling: Any, stream: tuple[int, int]) -> Any:
        now[0] += 1000.0 if stream[0] else 2.0  # an evaluation, a step
        return roll_out(trainer, prompts, sampling, stream)

    monkeypatch.setattr(OPSDTrainer, "roll_out", slow)
    trainer = tiny_trainer(tmp_path, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 4]
    for entry in logged:
        assert entry["tokens_per_second"] == pytest.approx(16 * entry["completion_length"] / 4.0)
    assert logged[-1]["seconds"] > 6000


def test_batch_of_another_collator_is_checked(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    rollouts = trainer.roll_out(trainer.prompts, trainer.sampling, (0, 0))
    batch = collate(rollouts, trainer.vocabulary.pad_id)
    trainer.compute_loss(trainer.student, batch, num_items_in_batch=10)
    shifted = batch | {"teacher_input_ids": batch["teacher_input_ids"].roll(1, dims=1)}
    with pytest.raises(ValueError, match="teacher_input_ids: expected student and teacher to see the same"):
        trainer.compute_loss(trainer.student, shifted, num_items_in_batch=10)


def test_prompts_that_leave_no_room_for_a_completion_are_refused(tmp_path: Path) -> None:
    # The longest prompts are row 3's: 10 tokens for the student, 14 for the teacher.
    tiny_trainer(tmp_path, tiny_model(max_position_embeddings=20))
    with pytest.raises(
        ValueError,
        match="max_completion_length: expected at most 5, got 6: the teacher's prompt of row 3 has 14 "
        r"tokens, and the model 19 positions \(max_position_embeddings\)",
    ):
        tiny_trainer(tmp_path, tiny_model(max_position_embeddings=19))
    model, prompts = tiny_model(max_position_embeddings=40), tiny_prompts(tiny_config(tmp_path))
    check_positions(model, prompts, 26)
    with pytest.raises(ValueError, match="expected at most 30, got 31: the student's prompt of row 3 has 10"):
        check_positions(model, prompts, 31)
    model.config.__dict__["max_position_embeddings"] = None
    check_positions(model, prompts, 10**6)


def test_statistics_are_not_measured_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert OPSDConfig.logging_steps == 5
    assert "costs" in OPSDConfig.__dataclass_fields__["logging_steps"].metadata["help"]
    trainer = tiny_trainer(tmp_path, max_steps=6)
    measured: list[int] = []
    add = meter.Meter.add

    def counted(self: meter.Meter, *args: torch.Tensor) -> None:
        measured.append(trainer.state.global_step + 1)
        add(self, *args)

    monkeypatch.setattr(meter.Meter, "add", counted)
    trainer.train()
    assert measured == [1, 5, 6]


def test_no_rollouts_need_be_recorded(tmp_path: Path) -> None:
    assert inspect_rollouts(tiny_trainer(tmp_path), []) == []

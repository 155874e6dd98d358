"""Teachers that follow the student in other ways than every step, mix with it, or are another model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from driver_tiny import TOKENIZER, tiny_model, tiny_trainer
from opsd_kernels import Hidden, LogLinear
from opsd_train.backbone import logits
from opsd_train.demo.pretrain import build_tokenizer
from opsd_train.loading import with_lora
from opsd_train.teachers.weights import (
    EMA_FILE,
    SYNC_FILE,
    EmaTeacher,
    SyncTeacher,
    Teacher,
    TeacherRule,
    TrustRegionTeacher,
    make_teacher,
)
from opsd_train.watch.inspection import inspect_rollouts

IDS = torch.tensor([[4, 5, 6, 7, 8]])
MASK = torch.ones_like(IDS)


def nudge(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


def first(model: torch.nn.Module) -> float:
    """A weight, to be followed by hand."""
    return next(iter(model.state_dict().values())).flatten()[0].item()


def read(teacher: Teacher) -> torch.Tensor:
    """Log-probabilities, whatever the source."""
    return logits(teacher.source(IDS, MASK, 3)).log_softmax(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synced_teacher_is_the_student_of_the_last_multiple(dtype: torch.dtype) -> None:
    student = tiny_model().to(dtype)
    teacher = make_teacher(TeacherRule("sync", every=3), student)
    assert isinstance(teacher, SyncTeacher)
    expected = [first(student)]
    for step in range(1, 8):
        nudge(student)
        teacher.after_optimizer_step()
        expected.append(first(student) if step % 3 == 0 else expected[-1])
        assert first(teacher.model) == expected[-1]
    assert len(set(expected)) == 3
    assert all(tensor.dtype == dtype for tensor in teacher.average.values())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_synced_teacher_of_lora_has_the_effective_weights() -> None:
    student = with_lora(tiny_model(), rank=2, alpha=4, dropout=0.5)
    teacher = make_teacher(TeacherRule("sync", every=2), student)
    before = read(teacher)
    nudge(student)
    teacher.after_optimizer_step()
    assert torch.equal(read(teacher), before)
    teacher.after_optimizer_step()
    torch.testing.assert_close(read(teacher), read(Teacher(student)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(read(teacher), before, atol=0.1)


def test_average_every_few_steps_with_hard_copies() -> None:
    student = tiny_model()
    teacher = make_teacher(TeacherRule("ema", decay=0.75, every=2, copy_every=5), student)
    expected = first(student)
    for step in range(1, 13):
        nudge(student)
        teacher.after_optimizer_step()
        if step % 5 == 0:
            expected = first(student)
        elif step % 2 == 0:
            expected = 0.75 * expected + 0.25 * first(student)
        assert first(teacher.model) == pytest.approx(expected, rel=1e-5), step


@pytest.mark.parametrize("lora", [False, True])
def test_trust_region_is_the_geometric_mixture_of_initial_and_live(lora: bool) -> None:
    student = with_lora(tiny_model(), rank=2, alpha=4, dropout=0.5) if lora else tiny_model()
    teacher = make_teacher(TeacherRule("trust_region", share=0.3), student)
    assert isinstance(teacher, TrustRegionTeacher)
    initial = read(Teacher(tiny_model())).double()
    torch.testing.assert_close(read(teacher).double(), initial, rtol=1e-5, atol=1e-5)
    nudge(student)
    teacher.after_optimizer_step()
    live = read(Teacher(student)).double()
    assert not torch.allclose(live, initial, atol=0.1)
    mixed = initial.exp() ** 0.7 * live.exp() ** 0.3
    expected = (mixed / mixed.sum(dim=-1, keepdim=True)).log()
    torch.testing.assert_close(read(teacher).double(), expected, rtol=1e-4, atol=1e-4)
    source = teacher.source(IDS, MASK, 3)
    assert isinstance(source, LogLinear)
    hidden = [one for one in source.sources if isinstance(one, Hidden)]
    assert not any(one.hidden.requires_grad for one in hidden)
    assert (hidden[0].weight is hidden[1].weight) == lora


def test_trust_region_trains_and_is_inspected(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, teacher="trust_region", teacher_share=0.5, logging_steps=1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    (found,) = inspect_rollouts(trainer, trainer.prompts[:1])
    assert 0 < (found["tokens"][0]["teacher_top_prob"] or 0) <= 1


def test_another_model_teaches(tmp_path: Path) -> None:
    other = tiny_model(seed=5)
    other.save_pretrained(tmp_path / "other")
    TOKENIZER.save_pretrained(tmp_path / "other")
    student = tiny_model()
    teacher = make_teacher(TeacherRule("model", model=str(tmp_path / "other")), student, TOKENIZER)
    expected = read(Teacher(other))
    nudge(student)
    teacher.after_optimizer_step()
    torch.testing.assert_close(read(teacher), expected, rtol=1e-6, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    trainer = tiny_trainer(
        tmp_path / "run", teacher="model", teacher_model=str(tmp_path / "other"), max_steps=1
    )
    trainer.train()
    torch.testing.assert_close(read(trainer.teacher), expected, rtol=1e-6, atol=1e-6)
    larger = build_tokenizer()
    larger.add_tokens(["spam"])
    with pytest.raises(ValueError, match="teacher_model: expected a tokenizer with the student's vocabulary"):
        make_teacher(TeacherRule("model", model=str(tmp_path / "other")), student, larger)
    with pytest.raises(
        ValueError, match=r"model: expected a causal language model at|expected a local folder"
    ):
        make_teacher(TeacherRule("model", model=str(tmp_path / "no where")), student, TOKENIZER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "model"}, "teacher_model: expected a folder or hub id .*; got None with 'model'"),
        ({"teacher_model": "x"}, "teacher_model: expected .*; got 'x' with 'initial'"),
        ({"teacher_every": 0}, "teacher_every: expected at least 1, .*; got 0 and 0"),
        ({"teacher_copy_every": -1}, "teacher_every: expected .*; got 1 and -1"),
        ({"teacher_share": 1.5}, r"teacher_share: expected a number in \[0, 1\], got 1.5"),
        ({"ema_decay": 1.0}, "ema_decay: expected a number at least 0 and below 1, got 1.0"),
    ],
)
def test_wrong_rules(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **settings)


def test_rules_in_words() -> None:
    assert str(TeacherRule()) == "initial"
    assert str(TeacherRule("ema", 0.9)) == "ema (decay 0.9)"
    assert str(TeacherRule("ema", 0.9, 5, 30)) == "ema (decay 0.9 every 5 steps, copied every 30)"
    assert str(TeacherRule("sync", every=10)) == "sync every 10 steps"
    assert str(TeacherRule("trust_region", share=0.1)) == "trust_region (share 0.1)"


@pytest.mark.parametrize(
    "rule",
    [
        {"teacher": "sync", "teacher_every": 3},
        {"teacher": "ema", "ema_decay": 0.5, "teacher_every": 2, "teacher_copy_every": 3},
    ],
)
@pytest.mark.parametrize("lora", [False, True])
def test_resumed_run_counts_on(tmp_path: Path, rule: dict[str, Any], lora: bool) -> None:
    def run(out: Path, resume: Path | None = None) -> torch.Tensor:
        torch.manual_seed(0)  # LoRA draws its A
        model = with_lora(tiny_model(), rank=2, alpha=4, dropout=0.0) if lora else tiny_model()
        trainer = tiny_trainer(out, model, max_steps=5, save_strategy="steps", save_steps=2, **rule)
        trainer.train(resume_from_checkpoint=resume)
        followed = [p.flatten() for _, p in sorted(trainer.teacher.model.named_parameters())]
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad] + followed)

    whole = run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / SYNC_FILE).exists() == (rule["teacher"] == "sync")
    assert torch.equal(run(tmp_path / "resumed", checkpoint), whole)


def test_checkpoint_without_its_steps_is_refused(tmp_path: Path) -> None:
    teacher = EmaTeacher(tiny_model(), decay=0.5)
    teacher.save(tmp_path)
    save_file(load_file(tmp_path / EMA_FILE), tmp_path / EMA_FILE)
    with pytest.raises(ValueError, match="to hold this model's weights"):
        teacher.load(tmp_path)
    with pytest.raises(ValueError, match=f"expected {SYNC_FILE} in .*, for teacher 'sync'; got none"):
        SyncTeacher(tiny_model(), every=2).load(tmp_path)

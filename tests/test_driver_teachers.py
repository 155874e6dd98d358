"""The three teachers, full and LoRA, in training and across a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from driver_tiny import tiny_model, tiny_trainer
from opsd_kernels import Hidden
from opsd_train.loading import with_lora
from opsd_train.teachers.weights import (
    EMA_FILE,
    AdapterTeacher,
    EmaTeacher,
    Teacher,
    TeacherRule,
    make_teacher,
)

IDS = torch.tensor([[4, 5, 6, 7, 8]])
MASK = torch.ones_like(IDS)


def read(teacher: Teacher) -> torch.Tensor:
    source = teacher.source(IDS, MASK, 3)
    assert isinstance(source, Hidden)
    return source.hidden


def lora_model(seed: int = 1) -> PeftModel:
    """A LoRA model whose adapters do something."""
    model = with_lora(tiny_model(), rank=2, alpha=4, dropout=0.5)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def nudge(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)


def test_initial_teacher_stays_where_training_started() -> None:
    student = tiny_model()
    teacher = make_teacher(TeacherRule("initial"), student)
    before = read(teacher)
    nudge(student)
    teacher.after_optimizer_step()
    assert torch.equal(read(teacher), before)
    assert torch.equal(before, read(Teacher(tiny_model())))
    source = teacher.source(IDS, MASK, 3)
    assert isinstance(source, Hidden)
    assert not source.hidden.requires_grad
    assert not source.weight.requires_grad


def test_initial_teacher_of_lora_is_the_adapters_off() -> None:
    student = with_lora(tiny_model(), rank=2, alpha=4, dropout=0.5).train()
    teacher = make_teacher(TeacherRule("initial"), student)
    assert isinstance(teacher, AdapterTeacher)
    assert teacher.name is None
    for parameter in student.parameters():
        parameter.data.add_(1.0 if parameter.requires_grad else 0.0)
    torch.testing.assert_close(read(teacher), read(Teacher(tiny_model())), rtol=0, atol=0)
    assert not torch.allclose(read(teacher), read(Teacher(student)), atol=0.1)
    assert student.training
    assert student.get_model_status().enabled is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_teacher_of_adapters_that_do_something_is_the_student_as_given(dtype: torch.dtype) -> None:
    student = lora_model().to(dtype)
    flags = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    given = read(Teacher(student))
    teacher, second = (
        make_teacher(TeacherRule("initial"), student),
        make_teacher(TeacherRule("initial"), student),
    )
    assert not torch.allclose(read(Teacher(tiny_model().to(dtype))), given, atol=0.1)
    assert torch.equal(read(teacher), given)
    nudge(student)
    moved = read(Teacher(student))
    assert not torch.allclose(moved, given, atol=0.1)
    assert torch.equal(read(make_teacher(TeacherRule("initial"), student)), moved)
    for one in (teacher, second):
        assert one.model is student
        assert torch.equal(read(one), given)
    assert torch.equal(read(Teacher(student)), moved)
    now = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    assert {name for name in now if now[name]} == {name for name in flags if flags[name]}


def test_initial_teacher_of_several_adapters_is_a_copy_of_the_model() -> None:
    student = lora_model()
    student.add_adapter("other", student.peft_config["default"])
    student.base_model.set_adapter(["default", "other"])
    given = read(Teacher(student))
    teacher = make_teacher(TeacherRule("initial"), student)
    nudge(student)
    assert teacher.model is not student
    torch.testing.assert_close(read(teacher), given, rtol=1e-4, atol=1e-4)


def test_adapter_teacher_leaves_frozen_adapters_frozen() -> None:
    student = with_lora(tiny_model(), rank=2, alpha=4, dropout=0.5).train()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    student.get_base_model().model.layers[0].eval()
    flags = [parameter.requires_grad for parameter in student.parameters()]
    modes = [module.training for module in student.modules()]
    read(make_teacher(TeacherRule("initial"), student))
    assert [parameter.requires_grad for parameter in student.parameters()] == flags
    assert [module.training for module in student.modules()] == modes


@pytest.mark.parametrize("kind", ["initial", "ema"])
@pytest.mark.parametrize(
    ("settings", "offender"),
    [
        ({"modules_to_save": ["model.norm"]}, r"base_model\.\S*\.norm\.modules_to_save\.default\.weight"),
        ({"bias": "lora_only"}, r"base_model\.\S*\.layers\.0\.self_attn\.q_proj\.base_layer\.bias"),
    ],
)
def test_peft_model_that_trains_more_than_adapters_is_refused(
    kind: str, settings: dict[str, Any], offender: str
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], **settings)
    student = get_peft_model(tiny_model(attention_bias=True), config)
    with pytest.raises(ValueError, match=f"LoRA adapters alone, for '{kind}'; it trains {offender} too"):
        make_teacher(TeacherRule(kind), student)
    make_teacher(TeacherRule("live"), student)


def test_live_teacher_is_the_student_without_dropout() -> None:
    student = lora_model().train()
    teacher = make_teacher(TeacherRule("live"), student)
    first = read(teacher)
    assert torch.equal(read(teacher), first)
    assert not first.requires_grad
    nudge(student)
    assert not torch.allclose(read(teacher), first, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_of_all_weights(dtype: torch.dtype) -> None:
    student = tiny_model().to(dtype)
    teacher = EmaTeacher(student, decay=0.9)
    expected = {name: parameter.detach().double() for name, parameter in student.named_parameters()}
    for _ in range(5):
        nudge(student)
        teacher.after_optimizer_step()
        for name, parameter in student.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * parameter.detach().double()
    for name, parameter in teacher.model.named_parameters():
        torch.testing.assert_close(teacher.average[name].double(), expected[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(parameter, teacher.average[name].to(dtype))
        assert not parameter.requires_grad


def test_ema_moves_where_bf16_alone_would_stand_still() -> None:
    student = tiny_model().to(torch.bfloat16)
    teacher = EmaTeacher(student, decay=0.999)
    name, start = next((n, p.detach().float().clone()) for n, p in student.named_parameters())
    nudge(student)
    for _ in range(100):
        teacher.after_optimizer_step()
    moved = teacher.model.get_parameter(name).float() - start
    assert moved.norm() / start.norm() == pytest.approx(0.1 * (1 - 0.999**100), rel=0.05)


def test_ema_of_a_bf16_lora_student_hears_small_adapters() -> None:
    """They add less to a weight than half a unit in its last place in bf16."""
    student = with_lora(tiny_model().to(torch.bfloat16), rank=4, alpha=8, dropout=0.0)
    teacher = EmaTeacher(student, decay=0.98)
    before = {name: one.clone() for name, one in teacher.average.items()}
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    for _ in range(50):
        teacher.after_optimizer_step()
    for name, module in student.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            moved = teacher.average[f"{name}.weight"] - before[f"{name}.weight"]
            expected = (1 - 0.98**50) * module.get_delta_weight("default").float()
            assert (moved - expected).norm() < 1e-3 * expected.norm()


def test_ema_of_lora_is_that_of_the_effective_weights() -> None:
    student = lora_model()
    teacher = EmaTeacher(student, decay=0.7)

    def effective() -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": module.base_layer.weight
            + 2.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight
            for name, module in student.get_base_model().named_modules()
            if hasattr(module, "lora_A")
        }

    expected = {name: weight.detach() for name, weight in effective().items()}
    assert len(expected) == 14
    for _ in range(3):
        nudge(student)
        teacher.after_optimizer_step()
        expected = {
            name: 0.7 * expected[name] + 0.3 * weight.detach() for name, weight in effective().items()
        }
    own = dict(teacher.model.named_parameters())
    for name, weight in expected.items():
        torch.testing.assert_close(own[name], weight, rtol=1e-5, atol=1e-5)
    assert torch.equal(own["model.embed_tokens.weight"], tiny_model().model.embed_tokens.weight)


def test_unknown_teacher_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="teacher: expected one of initial, live, ema, sync, trust_region, model, served; got 'frozen'",
    ):
        tiny_trainer(tmp_path, teacher="frozen")


def test_lora_trains_the_adapters_alone(tmp_path: Path) -> None:
    model = with_lora(tiny_model(), rank=2, alpha=4, dropout=0.0)
    trainer = tiny_trainer(tmp_path, model, max_steps=2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    assert model.get_base_model().lm_head.weight.grad is None
    assert not model.get_base_model().lm_head.weight.requires_grad
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name


def test_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    on_head = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = get_peft_model(tiny_model(tie_word_embeddings=False), on_head)
    with pytest.raises(ValueError, match="head without an adapter, got one on lm_head"):
        tiny_trainer(tmp_path, model)
    trained = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model(tie_word_embeddings=False), trained)
    with pytest.raises(ValueError, match="head without an adapter, got one on lm_head"):
        tiny_trainer(tmp_path, model)


@pytest.mark.parametrize("teacher", ["initial", "ema"])
@pytest.mark.parametrize("lora", [False, True])
def test_resumed_run_is_the_run_that_went_on(tmp_path: Path, teacher: str, lora: bool) -> None:
    def run(out: Path, resume: Path | None = None) -> torch.Tensor:
        torch.manual_seed(0)  # LoRA draws its A
        model = with_lora(tiny_model(), rank=2, alpha=4, dropout=0.0) if lora else tiny_model()
        trainer = tiny_trainer(
            out,
            model,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            teacher=teacher,
            ema_decay=0.5,
            per_device_train_batch_size=2,
        )
        trainer.train(resume_from_checkpoint=resume)
        trained = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
        followed = [p.flatten() for _, p in sorted(trainer.teacher.model.named_parameters())]
        return torch.cat(trained + followed)

    whole = run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / EMA_FILE).exists() == (teacher == "ema")
    assert torch.equal(run(tmp_path / "resumed", checkpoint), whole)


def test_resuming_without_the_average_is_an_error(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    follower = tiny_trainer(tmp_path / "ema", teacher="ema")
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: expected {EMA_FILE}"):
        follower.train(resume_from_checkpoint=str(checkpoint))
    follower.teacher.save(checkpoint)
    assert load_file(checkpoint / EMA_FILE).keys() == dict(tiny_model().named_parameters()).keys()
    other = tiny_trainer(tmp_path / "other", tiny_model(num_hidden_layers=1), teacher="ema")
    with pytest.raises(ValueError, match="to hold this model's weights"):
        other.train(resume_from_checkpoint=str(checkpoint))

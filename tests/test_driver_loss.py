"""The trainer's loss is the definition, on the positions it should be on, however a step is cut up."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import (
    CohereForCausalLM,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GraniteForCausalLM,
    Qwen3ForCausalLM,
)

from driver_tiny import tiny_model, tiny_trainer
from opsd_train.backbone import causal_lm, check_head, completion_hidden, head_source, logits
from opsd_train.loading import with_lora
from opsd_train.rollouts import Rollout, collate
from opsd_train.trainer import OPSDTrainer

SMALL_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64} | dict.fromkeys(
    ("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0
)
MODELS = {
    "qwen3 tied": (Qwen3ForCausalLM, {}),
    "qwen3 untied": (Qwen3ForCausalLM, {"tie_word_embeddings": False}),
    "gemma2 soft-cap": (Gemma2ForCausalLM, {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}),
    "cohere logit scale": (CohereForCausalLM, {"logit_scale": 0.25}),
    "granite logits scaling": (GraniteForCausalLM, {"logits_scaling": 4.0}),
    "gpt2 learned positions": (GPT2LMHeadModel, SMALL_GPT2),
}


def rolled_out(trainer: OPSDTrainer) -> dict[str, torch.Tensor]:
    rollouts = trainer.roll_out(trainer.prompts, trainer.sampling, (0, 0))
    assert len({len(r.prompt.student_ids) for r in rollouts}) > 2
    assert len({len(r.completion) for r in rollouts}) > 1
    return collate(rollouts, trainer.vocabulary.pad_id)


def naive_loss(
    student: torch.nn.Module, teacher: torch.nn.Module, rollouts: Sequence[Rollout]
) -> torch.Tensor:
    """Forward KL from the full logits of one unpadded sequence at a time, in the models' own dtype."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for rollout in rollouts:
        sides = []
        for model, prompt in ((student, rollout.prompt.student_ids), (teacher, rollout.prompt.teacher_ids)):
            z = model(torch.tensor([prompt + rollout.completion])).logits[0]
            sides.append(log_softmax(z[len(prompt) - 1 : -1], dim=-1))
        s, t = sides[0], sides[1].detach()
        total = total + (t.exp() * (t - s)).sum().double()
        tokens += len(rollout.completion)
    return total / tokens


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_the_definition_s(tmp_path: Path, name: str) -> None:
    kind, settings = MODELS[name]
    trainer = tiny_trainer(tmp_path, tiny_model(kind=kind, **settings))
    batch = rolled_out(trainer)
    twin = tiny_model(kind=kind, **settings).double().eval()
    expected = naive_loss(twin, twin, trainer.roll_out(trainer.prompts, trainer.sampling, (0, 0)))
    expected.backward()

    loss = trainer.compute_loss(
        trainer.student, batch, num_items_in_batch=int(batch["completion_mask"].sum())
    )
    loss.backward()

    assert expected > 1e-3
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    for (key, found), truth in zip(trainer.student.named_parameters(), twin.parameters(), strict=True):
        if truth.grad is not None:
            error = (found.grad - truth.grad).norm() / truth.grad.norm().clamp(min=1e-6)
            assert error < 2e-4, key


def test_hidden_states_are_of_the_positions_that_predict_the_completion(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    batch = rolled_out(trainer)
    length = batch["completion_mask"].shape[1]
    hidden = completion_hidden(trainer.student, batch["input_ids"], batch["attention_mask"], length)
    assert hidden.shape == (8, length, 32)
    for row, rollout in enumerate(trainer.roll_out(trainer.prompts, trainer.sampling, (0, 0))):
        prompt, completion = rollout.prompt.student_ids, rollout.completion
        whole = causal_lm(trainer.student).model(torch.tensor([prompt + completion])).last_hidden_state[0]
        expected = whole[len(prompt) - 1 : -1]
        torch.testing.assert_close(hidden[row, : len(completion)], expected, rtol=1e-4, atol=1e-5)


def test_logits_of_the_sequence_are_never_formed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path, teacher="live")
    batch = rolled_out(trainer)

    def refuse(*args: object) -> None:
        raise AssertionError("the head was called")

    monkeypatch.setattr(trainer.student.lm_head, "forward", refuse)
    trainer.compute_loss(trainer.student, batch, num_items_in_batch=10).backward()
    assert trainer.student.lm_head.weight.grad.abs().sum() > 0


def test_masked_positions_do_not_matter(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    batch = rolled_out(trainer)
    loss = trainer.compute_loss(trainer.student, batch, num_items_in_batch=10)
    length = batch["completion_mask"].shape[1]
    for key in ("input_ids", "teacher_input_ids"):
        behind = torch.cat(
            [torch.zeros_like(batch[key][:, :-length]), 1 - batch["completion_mask"]], dim=1
        ).bool()
        batch[key] = torch.where(behind, 17, batch[key])
    assert trainer.compute_loss(trainer.student, batch, num_items_in_batch=10).item() == loss.item()


@pytest.mark.parametrize("teacher", ["initial", "live"])
def test_one_batch_of_eight_is_eight_batches_of_one(tmp_path: Path, teacher: str) -> None:
    weights, losses = [], []
    for batch_size in (8, 2, 1):
        trainer = tiny_trainer(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            max_steps=3,
            teacher=teacher,
            optim="sgd",
            logging_steps=1,
            learning_rate=0.1,
        )
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.student.parameters()]))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    start = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    assert (weights[0] - start).norm() > 0.05
    for other in (1, 2):
        assert losses[other] == pytest.approx(losses[0], rel=1e-4)
        assert (weights[other] - weights[0]).norm() / (weights[0] - start).norm() < 1e-4


def test_objective_and_loss_temperature_reach_the_engine(tmp_path: Path) -> None:
    def value(**settings: object) -> float:
        trainer = tiny_trainer(tmp_path, **settings)
        return trainer.compute_loss(trainer.student, rolled_out(trainer), num_items_in_batch=1).item()

    plain = value()
    assert value(objective="reverse_kl") != pytest.approx(plain, rel=1e-3)
    assert value(objective="jsd", beta=0.0) == pytest.approx(plain, rel=1e-5)
    assert value(entry_clip=1e-3) < plain
    assert value(objective="opsd") == pytest.approx(value(entry_clip=0.05), rel=1e-6)
    assert value(loss_temperature=50.0) < plain / 10


class Shifted(Qwen3ForCausalLM):
    """Logits in a way of its own, at one entry of the vocabulary and by a thousandth."""

    def forward(self, *args: object, **kwargs: object) -> object:
        outputs = super().forward(*args, **kwargs)
        outputs.logits[..., 3] += 1e-3 * outputs.logits.abs().max()
        return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_with_another_head_is_refused(dtype: torch.dtype) -> None:
    check_head(tiny_model().to(dtype), (4, 5, 6))
    with pytest.raises(ValueError, match=r"logits of Shifted differ from that by 0\.10% of the largest"):
        check_head(tiny_model(kind=Shifted).to(dtype), (4, 5, 6))


def test_source_s_logits_are_the_model_s() -> None:
    for kind, settings in MODELS.values():
        model = tiny_model(kind=kind, **settings).eval()
        ids = torch.tensor([[4, 5, 6, 7]])
        hidden = completion_hidden(model, ids, torch.ones_like(ids), length=1)
        found = logits(head_source(model, hidden))[0, 0]
        torch.testing.assert_close(found, model(ids).logits[0, 2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, lora: bool) -> None:
    weights = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = with_lora(tiny_model(), rank=2, alpha=4, dropout=0.0) if lora else tiny_model()
        tiny_trainer(tmp_path, model, gradient_checkpointing=checkpointing).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bf16_is_as_near_to_fp64_as_the_definition_in_bf16(tmp_path: Path, how: str) -> None:
    """Root mean squares over four models; of the weights as bf16 has them, where they are in bf16."""
    errors, eager_errors = [], []
    for seed in range(4):
        model = tiny_model(seed).bfloat16() if how == "weights" else tiny_model(seed)
        trainer = tiny_trainer(tmp_path, copy.deepcopy(model), max_steps=1, bf16=how == "autocast")
        rollouts = trainer.roll_out(trainer.prompts, trainer.sampling, (0, 0))
        batch = collate(rollouts, trainer.vocabulary.pad_id)
        twin = copy.deepcopy(model).double().eval()
        with torch.no_grad():
            expected = naive_loss(twin, twin, rollouts).item()
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                eager = naive_loss(model.eval(), model, rollouts).item()
            tokens = int(batch["completion_mask"].sum())
            with trainer.compute_loss_context_manager():
                found = trainer.compute_loss(trainer.student, batch, num_items_in_batch=tokens).item()
        errors.append(found / expected - 1)
        eager_errors.append(eager / expected - 1)
    trainer.train()
    assert all(bool(weight.isfinite().all()) for weight in trainer.student.parameters())
    error, eager_error = (math.sqrt(sum(e * e for e in found) / 4) for found in (errors, eager_errors))
    assert 0 < error < 2 * eager_error < 0.02

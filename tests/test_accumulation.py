"""How a step is cut into micro-batches changes neither its loss nor its gradient, whatever else is on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from driver_tiny import tiny_model, tiny_trainer
from opsd_train.backbone import causal_lm
from opsd_train.loading import with_lora
from opsd_train.trainer import OPSDTrainer
from recorder import Recorder

MODELS = ("tied", "untied", "LoRA")


def trainer_of(out: Path, model: str, **settings: Any) -> OPSDTrainer:
    torch.manual_seed(0)
    # No other matrix has the shape of the head.
    base = tiny_model(tie_word_embeddings=model != "untied", vocab_size=40)
    student = base
    if model == "LoRA":
        student = with_lora(base, rank=2, alpha=4, dropout=0.0)
        for name, one in student.named_parameters():
            if "lora_B" in name:  # which begins at zero, and the gradient of A with it
                torch.nn.init.normal_(one, std=0.1)
    return tiny_trainer(out, student, **settings)


def step_of(out: Path, model: str, size: int, **settings: Any) -> tuple[float, Tensor]:
    """Loss and gradient of a whole step of eight rows in micro-batches of a size."""
    trainer = trainer_of(
        out, model, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **settings
    )
    if settings.get("gradient_checkpointing"):
        trainer.student.gradient_checkpointing_enable()
    size = trainer.args.per_device_train_batch_size
    rows = iter([trainer.prompts[i : i + size] for i in range(0, 8, size)])
    batches, tokens = trainer.get_batch_samples(rows, 8 // size, torch.device("cpu"))
    assert len(batches) == 8 // size
    losses = [trainer.training_step(trainer.student, batch, tokens) for batch in batches]
    gradients = [one.grad.flatten() for one in trainer.student.parameters() if one.grad is not None]
    return torch.stack(losses).double().sum().item(), torch.cat(gradients).double()


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_one_of_eight_is_eight_of_one(tmp_path: Path, model: str, checkpointing: bool) -> None:
    """To 1e-6, in fp32; the rows have completions of different lengths."""
    loss, gradient = step_of(tmp_path, model, 8)
    for size in (1, 2):
        other = step_of(tmp_path, model, size, gradient_checkpointing=checkpointing)
        assert other[0] == pytest.approx(loss, rel=1e-6)
        assert relative(other[1], gradient) < 1e-6


@pytest.mark.parametrize("model", ["tied", "LoRA"])
def test_mean_of_means_would_not_do(tmp_path: Path, model: str) -> None:
    """What the promise is about: a normaliser of each micro-batch's own is off by far more than 1e-6."""
    trainer = trainer_of(tmp_path, model, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    rows = iter([[prompt] for prompt in trainer.prompts])
    batches, tokens = trainer.get_batch_samples(rows, 8, torch.device("cpu"))
    counts = [int(batch["counted"].sum()) for batch in batches]
    assert sum(counts) == tokens
    assert len(set(counts)) > 1
    student = trainer.student
    whole = sum(trainer.compute_loss(student, one, num_items_in_batch=tokens).item() for one in batches)
    means = [trainer.compute_loss(student, one).item() for one in batches]
    assert abs(sum(means) / 8 / whole - 1) > 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_autocast_stays_close(tmp_path: Path, model: str) -> None:
    loss, gradient = step_of(tmp_path, model, 8)
    for size in (8, 1):
        for checkpointing in (False, True):
            near = step_of(tmp_path, model, size, bf16=True, gradient_checkpointing=checkpointing)
            assert near[0] != loss
            assert near[0] == pytest.approx(loss, rel=0.02)
            assert relative(near[1], gradient) < 0.1
            assert torch.cosine_similarity(near[1], gradient, dim=0) > 0.995


@pytest.mark.parametrize(("model", "trained"), [("tied", True), ("untied", True), ("LoRA", False)])
def test_frozen_head_has_no_gradient_product(tmp_path: Path, model: str, trained: bool) -> None:
    trainer = trainer_of(tmp_path, model, logging_first_step=False)  # statistics cost two more
    head = causal_lm(trainer.student).lm_head.weight
    batches, tokens = trainer.get_batch_samples(iter([trainer.prompts]), 1, torch.device("cpu"))
    with Recorder() as recorder:
        trainer.training_step(trainer.student, batches[0], tokens)
    assert (head.grad is not None) == trained
    of_head = [gemm for gemm in recorder.gemms if 40 in gemm[0] + gemm[1]]
    gradients = [(left, right) for left, right in of_head if {left[0], right[1]} == {40, 32}]
    assert (len(of_head), len(gradients)) == ((4, 1) if trained else (3, 0))


def test_tied_head_gets_the_sum_of_both_gradients(tmp_path: Path) -> None:
    """Of an untied model with the same weights in both places."""
    tied, untied = (tiny_model(tie_word_embeddings=one) for one in (True, False))
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        trainer = tiny_trainer(tmp_path, model)
        batches, tokens = trainer.get_batch_samples(iter([trainer.prompts]), 1, torch.device("cpu"))
        trainer.training_step(model, batches[0], tokens)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    own = [untied.lm_head.weight.grad, untied.get_input_embeddings().weight.grad]
    assert min(one.norm().item() for one in own) > 1e-3
    torch.testing.assert_close(tied.lm_head.weight.grad, own[0] + own[1], rtol=1e-5, atol=1e-6)

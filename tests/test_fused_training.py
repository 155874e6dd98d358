"""Twenty steps of training with the fused loss are those of a plain loop with full logits."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel, get_scheduler

from driver_tiny import tiny_model, tiny_trainer
from opsd_train.rollouts import Rollout
from opsd_train.trainer import OPSDTrainer

STEPS, RATE = 20, 1e-3
BELOW = 1e-5  # in nats


def logprobs(model: PreTrainedModel, rollouts: Sequence[Rollout], teacher: bool) -> list[torch.Tensor]:
    """Of every rollout the distributions [C, V] at its completion, alone and from full logits."""
    found = []
    for one in rollouts:
        prompt = one.prompt.teacher_ids if teacher else one.prompt.student_ids
        z = model(torch.tensor([prompt + one.completion])).logits[0]
        found.append(log_softmax(z[len(prompt) - 1 : -1], dim=-1))
    return found


def token_loss(s: torch.Tensor, t: torch.Tensor, objective: str) -> torch.Tensor:
    """[C], from log-probabilities, by the definition."""
    if objective == "jsd":
        m = ((s.exp() + t.exp()) / 2).log()
        return (t.exp() * (t - m)).sum(-1) / 2 + (s.exp() * (s - m)).sum(-1) / 2
    return (t.exp() * (t - s)).sum(-1)


def unfused(steps: Sequence[Sequence[Rollout]], objective: str) -> tuple[list[float], PreTrainedModel]:
    """The losses, and the student, of a loop that forms all logits and leaves the gradient to autograd."""
    student, teacher = tiny_model().train(), tiny_model().eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, 0, STEPS)
    losses = []
    for rollouts in steps:
        with torch.no_grad():
            said = logprobs(teacher, rollouts, teacher=True)
        pairs = zip(logprobs(student, rollouts, teacher=False), said, strict=True)
        loss = torch.cat([token_loss(s, t, objective) for s, t in pairs]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, student


def fused(out: Path, objective: str) -> tuple[OPSDTrainer, list[list[Rollout]]]:
    """A run of the trainer, in micro-batches, and the rollouts of its steps."""
    trainer = tiny_trainer(
        out,
        objective=objective,
        max_steps=STEPS,
        learning_rate=RATE,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
    )
    steps: list[list[Rollout]] = []
    roll_out = trainer.roll_out

    def watching(*asked: object) -> list[Rollout]:
        steps.append(roll_out(*asked))  # type: ignore[arg-type]
        return steps[-1]

    trainer.roll_out = watching  # type: ignore[method-assign]
    trainer.train()
    return trainer, steps


@pytest.mark.parametrize("objective", ["forward_kl", "jsd"])
def test_twenty_steps_fused_are_twenty_steps_unfused(tmp_path: Path, objective: str) -> None:
    trainer, steps = fused(tmp_path, objective)
    assert len(steps) == STEPS
    expected, student = unfused(steps, objective)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(abs(ours - theirs) for ours, theirs in zip(logged, expected, strict=True)) <= BELOW
    own = dict(trainer.student.named_parameters())
    moved, apart = (
        max((own[name] - one).abs().max() for name, one in model.named_parameters())
        for model in (tiny_model(), student)
    )
    assert apart <= 1e-2 * moved

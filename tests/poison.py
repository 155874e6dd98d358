"""Numbers that are not finite, put into chosen steps of a trainer; what a step must leave as it was."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import TrainerCallback

from opsd_train.trainer import OPSDTrainer

KINDS = ("teacher row", "weight gradient", "loss")


def poison(trainer: OPSDTrainer, kind: str, steps: Iterable[int], value: float = torch.nan) -> None:
    """In these steps, counted from 1, one micro-batch (the second, if there is one) is not finite."""
    chosen = set(steps)
    seen: dict[int, int] = {}

    def strikes() -> bool:
        step = trainer.state.global_step + 1
        seen[step] = seen.get(step, 0) + 1
        return step in chosen and seen[step] == min(2, trainer.args.gradient_accumulation_steps)

    if kind == "teacher row":
        trainer.teacher.source = _of_a_row(trainer.teacher.source, strikes, value)
    elif kind == "weight gradient":
        weight = next(one for one in trainer.student.parameters() if one.requires_grad)
        weight.register_hook(lambda gradient: gradient * (value if strikes() else 1.0))
    else:
        compute = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: (
            compute(*args, **kwargs) * (value if strikes() else 1.0)
        )


def _of_a_row(source: Callable[..., Any], strikes: Callable[[], bool], value: float) -> Callable[..., Any]:
    def poisoned(*args: Any) -> Any:
        found = source(*args)
        if strikes():
            found.hidden[-1] = value
        return found

    return poisoned


class Snapshots(TrainerCallback):
    """All that a skipped step leaves alone, as it is after each step."""

    def __init__(self, trainer: OPSDTrainer) -> None:
        self.trainer = trainer
        self.taken = {0: self.take()}
        trainer.add_callback(self)

    def take(self) -> dict[str, Any]:
        trainer = self.trainer
        optimizer = trainer.optimizer.state_dict() if trainer.optimizer else {"state": {}}
        schedule = trainer.lr_scheduler
        average = getattr(trainer.teacher, "average", {})
        return {
            "weights": [one.detach().clone() for one in trainer.student.parameters()],
            "moments": [x.clone() for one in optimizer["state"].values() for x in one.values()],
            "schedule": schedule.last_epoch if schedule else 0,
            "teacher": [one.clone() for one in average.values()],
            "teacher steps": getattr(trainer.teacher, "steps", 0),
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert all(one.grad is None for one in self.trainer.student.parameters())
        self.taken[state.global_step] = self.take()

    def same(self, one: int, other: int) -> dict[str, bool]:
        """Which parts are bitwise the same after two steps."""
        first, second = self.taken[one], self.taken[other]
        return {
            name: len(first[name]) == len(second[name])
            and all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True))
            if isinstance(first[name], list)
            else first[name] == second[name]
            for name in first
        }

"""Steps whose loss or gradient is not finite: skipped on every rank, counted, and only so many in a row.

The trainer's global step goes on over a skipped step, for the step says which rows are next, which random
numbers their rollouts are drawn from, and where a resumed run goes on: the next step is another one, and a
run ends after `max_steps` whatever happens. Everything else stays as it was: weights, optimizer, learning
rate schedule, teacher and pieces.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from opsd_train.rollouts import evaluating
from opsd_train.safety.bad_step import BadStep
from opsd_train.safety.keep import BadSteps
from opsd_train.safety.zero import WatchedEngine
from opsd_train.steps import Written


@dataclass
class Heard:
    """What a step has brought so far on this rank: its rollouts, and each micro-batch with its loss."""

    written: Written | None = None
    parts: list[tuple[Mapping[str, Tensor], Tensor]] = field(default_factory=list)
    loss_skips: bool = True


class SkippedSteps(TrainerCallback, ExportableState):
    """Counts steps that were skipped; the counts are in every checkpoint's `trainer_state.json`."""

    def __init__(self) -> None:
        self.total = 0  # that were skipped
        self.in_a_row = 0  # that were bad, up to the last one
        self.now = False  # whether the step under way is skipped
        self.bad = False  # whether it is bad: a private step is, and yet not skipped, see `private_run`

    def judge(self, bad: bool, skipped: bool) -> None:
        """Count a step."""
        self.bad, self.now = bad, skipped
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if bad else 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"total": self.total, "in_a_row": self.in_a_row}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from the counts of the checkpoint, or from none."""
        name = type(self).__name__
        states: Any = state.stateful_callbacks  # by name, once a run has begun
        held = states.get(name) if state.global_step else None
        counts = held["attributes"] if isinstance(held, dict) else {"total": 0, "in_a_row": 0}
        self.total, self.in_a_row = counts["total"], counts["in_a_row"]
        self.now = self.bad = False
        states[name] = self.state()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A bad step has a line of metrics of its own, whenever the next one is due."""
        if self.bad:
            control.should_log = True


class FiniteSteps(Trainer):
    """A trainer that leaves out a step whose loss, of any micro-batch on any rank, or gradient is not finite.

    The subclass says what a step is made of: `expect` before its micro-batches, `hear` after each of them.

    With an fp16 gradient scaler a gradient that is not finite is the scaler's business: it skips the step
    itself, and such steps are no sign of anything. DeepSpeed's engine moves the weights within `backward`; it
    leaves out what `WatchedEngine` tells it to, and the norm of such a step's gradient is inf.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heard = Heard()
        self.add_callback(SkippedSteps)

    @property
    def skipped(self) -> SkippedSteps:
        """The counts."""
        return next(one for one in self.callback_handler.callbacks if isinstance(one, SkippedSteps))

    @property
    def step_skipped(self) -> bool:
        """Whether the optimizer leaves, or left, the weights alone in this step."""
        return self.skipped.now or self.accelerator.optimizer_step_was_skipped

    def expect(self, written: Written | None) -> None:
        """A step begins with these rollouts."""
        self.heard = Heard(written)

    def hear(self, inputs: Mapping[str, Tensor], loss: Tensor, loss_skips: bool = True) -> None:
        """Take note of a micro-batch's loss, without waiting for the device.

        Args:
            inputs: the micro-batch.
            loss: its part of the step's loss, a scalar.
            loss_skips: whether a loss that is not finite skips the step, or its gradient alone does.
        """
        self.heard.parts.append((inputs, loss.detach()))
        self.heard.loss_skips = loss_skips

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the number of steps skipped; a loss is logged as it is, and the next mean starts anew."""
        if "loss" in logs:
            logs["skipped_steps"] = self.skipped.total
            if not math.isfinite(logs["loss"]):
                self._tr_loss.zero_()  # the trainer subtracts what it has logged: nan - nan stays nan
        super().log(logs, start_time)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[torch.nn.Module, Any]:
        """Wrap the model; DeepSpeed's engine is to ask before each of its steps."""
        found = super()._prepare_for_training(*args, **kwargs)
        if self._engine_steps():
            engine = self.accelerator.deepspeed_engine_wrapped.engine
            self.accelerator.deepspeed_engine_wrapped = WatchedEngine(engine, self._bad_before_step)
        return found

    def _bad_before_step(self, loss: Tensor) -> bool:
        """Whether the losses of a step, of which the last one is given, have one that is not finite."""
        losses = torch.stack([*(one for _, one in self.heard.parts), loss])
        return not self._scaled() and self._anywhere(~losses.isfinite().all())[0]

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm before clipping; here, between the gradient and the optimizer, the step is judged."""
        norm = super()._get_grad_norm(model, grad_norm)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._judge(model, torch.as_tensor(0.0 if whole is None else whole))
        return norm

    def _judge(self, model: torch.nn.Module, norm: Tensor) -> None:
        """Skip the step on all ranks if it is bad on any of them.

        Raises:
            BadSteps: it was one too many.
        """
        losses = torch.stack([loss for _, loss in self.heard.parts])
        of_loss, of_norm = self._anywhere(~losses.isfinite().all(), ~norm.isfinite())
        scaled = self._scaled()
        of_norm &= not scaled
        bad = of_loss or of_norm
        skipped = bad and not scaled and (of_norm or self.heard.loss_skips)
        self.skipped.judge(bad, skipped)
        if bad and self.skipped.in_a_row >= self.args.max_bad_steps:  # type: ignore[attr-defined]
            try:
                self._end(model, norm)
            finally:  # it was not completed: a run that goes on from the step before comes to it again
                self.skipped.total -= skipped
                self.skipped.in_a_row -= 1
        if not self._engine_steps() and not scaled:
            self._hold(skipped)

    def _hold(self, held: bool) -> None:
        """Have the optimizer and the learning rate's schedule leave this step out, or not.

        To accelerate it is then a micro-batch that others of its step follow, so that its optimizer does
        nothing, whatever kind it is, and one that overflowed, so that the trainer leaves the schedule alone.
        """
        optimizer: Any = self.optimizer  # of accelerate
        if held:
            optimizer.zero_grad()
            self.accelerator.gradient_state._set_sync_gradients(False)
        optimizer._is_overflow = held

    def _anywhere(self, *flags: Tensor) -> list[bool]:
        """Whether a flag is set on any rank."""
        mine = torch.stack([flag.to(self.args.device) for flag in flags]).float()
        found: Tensor = self.accelerator.reduce(mine, reduction="sum")
        return (found > 0).tolist()

    def _engine_steps(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _scaled(self) -> bool:
        """Whether losses are scaled for fp16, by accelerate or by DeepSpeed's engine."""
        fp16 = self.accelerator.mixed_precision == "fp16"
        return self.accelerator.scaler is not None or (self._engine_steps() and fp16)

    def _end(self, model: torch.nn.Module, norm: Tensor) -> None:
        """Save what every rank has of this step, and raise BadSteps."""
        step = self.state.global_step + 1
        folder = Path(self.args.output_dir or ".") / f"bad-step-{step}"
        bad = BadStep(
            step=step,
            rank=self.accelerator.process_index,
            grad_norm=norm.item(),
            skipped_steps=self.skipped.total,
            written=self.heard.written,
            parts=self.heard.parts,
        )
        bad.save(folder)
        bad.save(folder, self._row_losses(model, bad))
        raise BadSteps(
            f"the loss or the gradient was not finite in {self.skipped.in_a_row} steps in a row, up to step "
            f"{step}; {folder} holds that step's batch, and the checkpoints are as they were. "
            f"max_bad_steps is {self.args.max_bad_steps}."  # type: ignore[attr-defined]
        )

    @torch.no_grad()
    def _row_losses(self, model: torch.nn.Module, bad: BadStep) -> list[float]:
        """The loss of every row on its own; ranks with fewer rows repeat, since sharded weights need all."""
        rows = list(bad.rows())
        count = torch.tensor([len(rows)], device=self.args.device)
        rounds = int(self.accelerator.gather(count).max())
        losses = []
        with evaluating(model), self.compute_loss_context_manager():
            for i in range(rounds if rows else 0):
                row = self._prepare_inputs(dict(rows[i % len(rows)]))
                loss: Any = self.compute_loss(model, row)
                losses.append(float(loss))
        return losses[: len(rows)]

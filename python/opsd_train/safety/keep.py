"""The last complete step of a run that ends early, written as the checkpoint that it would have been."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from opsd_train.safety.random_state import random_state, set_random_state
from opsd_train.safety.zero_options import not_kept


class BadSteps(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite; their last batch was saved."""


class LastStep(TrainerCallback):
    """Remembers what the weights alone do not say of the last complete step, and which step was saved.

    Args:
        trainer: whose step it is.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._forget()

    def _forget(self) -> None:
        self.random: dict[str, Any] | None = None  # after that step; None if this run completed none
        self.loss: Tensor | None = None  # that it has not logged yet, while the next one adds to it
        self.saved: int | None = None  # the step that this run wrote a checkpoint of last

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing of an earlier call of `train` counts."""
        self._forget()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The loss is that of whole steps for the last time."""
        self.loss = self.trainer._tr_loss.clone()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One more is complete."""
        self.random, self.loss = random_state(), None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """It is on the disk: not a folder of that name that another run may have left."""
        self.saved = state.global_step

    def keep(self) -> tuple[int, Path | None]:
        """Save the last complete step as if it had just ended, unless that was done; every rank is needed.

        Returns the step and its checkpoint: 0 if none was complete, None where no checkpoint can hold it.
        """
        trainer = self.trainer
        step = trainer.state.global_step
        if self.random is None:
            return 0, None
        plugin = trainer.args.deepspeed_plugin
        if plugin is not None and not_kept(plugin) is not None:
            return step, None
        if self.saved != step:  # the same on every rank, since all of them save
            set_random_state(self.random)
            if self.loss is not None:
                trainer._tr_loss.copy_(self.loss)
            trainer._save_checkpoint(trainer.model, trial=None)  # type: ignore[arg-type]
            trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        return step, Path(trainer.args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def keep_after(self, error: Exception) -> None:
        """Do it when an error ends the run, which gets a note of what became of the step."""
        try:
            _, checkpoint = self.keep()
        except Exception as failure:
            error.add_note(f"step {self.trainer.state.global_step} could not be saved: {failure}")
            return
        if checkpoint is not None:
            error.add_note(f"the last complete step is kept in {checkpoint}")

"""What a checkpoint holds besides the student, and which one a run goes on from."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from opsd_train import stops

if TYPE_CHECKING:
    from opsd_train.trainer import OPSDTrainer


def newest_checkpoint(folder: str | os.PathLike[str] | None) -> str:
    """The newest checkpoint in a run's folder; ValueError if there is none."""
    path = Path(folder or ".")
    found = get_last_checkpoint(str(path)) if path.is_dir() else None
    if found is None:
        raise ValueError(f"resume_from_checkpoint: expected a checkpoint in {path}, found none")
    return found


def checkpoint_of(
    resume: str | os.PathLike[str] | bool | None, folder: str | os.PathLike[str] | None
) -> str | None:
    """The folder to resume from: one that is named, the newest in a run's folder for True, else None."""
    if resume is True:
        return newest_checkpoint(folder)
    return None if resume is None or resume is False else os.fspath(resume)


class StepCallback(TrainerCallback):
    """Lets teacher and pieces follow the student, puts them into every checkpoint, and ends the meter's step.

    Args:
        trainer: whose they are.
    """

    def __init__(self, trainer: "OPSDTrainer") -> None:
        self.trainer = trainer

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the teacher, unless the step was skipped."""
        if not self.trainer.step_skipped:
            self.trainer.engine_behind = True
            self.trainer.teacher.after_optimizer_step()
            if self.trainer.pieces.exposure is not None:
                self.trainer.pieces.exposure.after_optimizer_step()
        self.trainer.meter.end_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on along the weights' path where that is due."""
        if self.trainer.pieces.extrapolation is not None and not self.trainer.step_skipped:
            with stops.deferred():  # in the middle of a search the weights are not those of any step
                self.trainer.pieces.extrapolation.search_if_due(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the teacher and the pieces."""
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self.trainer.teacher.save(folder)
        self.trainer.pieces.save(folder)

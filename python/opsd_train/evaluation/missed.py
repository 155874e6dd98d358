"""An evaluation that was due when a run stopped, and that the run makes up for when it goes on."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from opsd_train.trainer import OPSDTrainer
from opsd_train.watch.record import RunRecord, load_run


class MissedEvaluation(TrainerCallback):
    """Evaluates a resumed run at its first step, if that was due there and is not in its record.

    A signal cuts an evaluation off, or ends the run in front of it. The step that was evaluated is kept by
    then, so that no later step would come back to it.

    Args:
        trainer: of the run; every process adds one.
        written: the record, of the process that has it.
    """

    def __init__(self, trainer: OPSDTrainer, written: RunRecord | None) -> None:
        self.trainer, self.written = trainer, written

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The weights are those of the checkpoint, and nothing has been drawn."""
        if not state.global_step or not self.trainer.held_out or not was_due(args, state):
            return
        if not self.trainer.ranks.any(is_known(self.written, state.global_step)):
            metrics = self.trainer._evaluate(None, None)
            self.trainer._determine_best_metric(metrics=metrics, trial=None)


def was_due(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether a run evaluates after the step that it is at."""
    rule, found = DefaultFlowCallback(), TrainerControl()
    rule.on_step_end(args, state, found)
    if state.epoch is not None and state.epoch == int(state.epoch):
        rule.on_epoch_end(args, state, found)
    return found.should_evaluate


def is_known(written: RunRecord | None, step: int) -> bool:
    """Whether a record has the evaluation of a step; without a record it is not known."""
    return written is not None and step in {
        evaluation["step"] for evaluation in load_run(written.directory).evaluations
    }

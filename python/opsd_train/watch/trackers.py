"""Trackers besides the run folder: those of `report_to`, through transformers' own callbacks."""

from datetime import datetime
from pathlib import Path

from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback

EVENTS = "tensorboard"


def aim(trainer: Trainer) -> None:
    """Let TensorBoard's events go to the run folder, and give the run a name if it has none.

    TensorBoard's callback asks for its folder when training begins: the evaluation before that would have it
    open one in the working directory, for the whole run. trackio's ends its run with the training: by its
    name the evaluation after that finds it again, instead of starting another.
    """
    folder = Path(trainer.args.output_dir or ".").resolve()
    if trainer.args.run_name is None:
        trainer.args.run_name = f"{folder.name}-{datetime.now():%Y%m%d-%H%M%S}"
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / EVENTS)

"""Trackers besides the run folder: those of `report_to`, through transformers' own callbacks."""

from pathlib import Path

from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback

EVENTS = "tensorboard"


def aim(trainer: Trainer) -> None:
    """Let TensorBoard's events go to the run folder.

    The callback asks for its folder when training begins. The evaluation before that would have it open one
    in the working directory, for the whole run.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(trainer.args.output_dir or ".") / EVENTS)

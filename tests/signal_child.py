"""A tiny run as a command, for signals from outside.

python signal_child.py OUT STEPS [resume]
"""

import sys
import time
from pathlib import Path
from typing import Any

import typer
from transformers import TrainerCallback

from driver_tiny import tiny_trainer
from opsd_train.commands.terminal import early_ends
from opsd_train.safety import stops


class Slowly(TrainerCallback):
    """Steps that are slow enough for a signal, and that say where they are."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"step {state.global_step + 1}", flush=True)
        time.sleep(0.05)


app = typer.Typer()


@app.command()
def main(out: Path, steps: int, resume: bool = False) -> None:
    """Train."""
    trainer = tiny_trainer(out, per_device_train_batch_size=1, gradient_accumulation_steps=8, max_steps=steps)
    trainer.add_callback(Slowly())
    with early_ends(), stops.watched(trainer):
        trainer.train(resume_from_checkpoint=resume)


if __name__ == "__main__":
    sys.exit(app())

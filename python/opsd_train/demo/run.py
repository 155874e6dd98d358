"""The demo: a model that half knows addition teaches itself from what it can read off the answer."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from opsd_train.commands.options import parse
from opsd_train.config import OPSDConfig
from opsd_train.data.rows import load_rows
from opsd_train.demo import task
from opsd_train.loading import load
from opsd_train.train import check_output, make_trainer
from opsd_train.trainer import OPSDTrainer

HERE = Path(__file__).parent
PRESET, MODEL = HERE / "preset.yaml", HERE / "model"
THREADS = 1  # at this size more gain little, wait for each other on a busy machine, and sum in another order


def demo(arguments: Sequence[str], console: Console) -> OPSDTrainer:
    """The demo's trainer, with `arguments` (`--name value`) in place of what the preset says."""
    (config,) = parse([OPSDConfig], [PRESET], arguments)
    check_output(config.output_dir, "replace")
    torch.set_num_threads(THREADS)
    with console.status("preparing"):
        model, tokenizer = load(str(MODEL))
        count = config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
        drawn = task.train_problems(count, torch.Generator().manual_seed(config.seed))
        rows, held_out = (
            load_rows(problems, config.to_templates()) for problems in (drawn, task.report_problems())
        )
        return make_trainer(model, tokenizer, rows, held_out, config)

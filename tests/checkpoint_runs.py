"""Small runs with checkpoints: one over eight prompts, resumed with other weights and random numbers."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from driver_tiny import tiny_model, tiny_trainer
from opsd_train.loading import with_lora
from opsd_train.safety import folders
from opsd_train.trainer import OPSDTrainer

EVERY = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
OWN = {"training_args.json", "trainer_state.json", "adapter_config.json"}  # name folders or hold times


def student(lora: bool, seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    if not lora:
        return tiny_model(seed).to(dtype)
    model = tiny_model(0)
    torch.manual_seed(seed)  # LoRA draws its A
    return with_lora(model, rank=2, alpha=4, dropout=0.3)


def go(
    out: Path,
    resume: Path | None = None,
    lora: bool = False,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> OPSDTrainer:
    """A run over 8 prompts. One that is resumed begins with other weights and another random state."""
    model = student(lora, 0 if resume is None else 1, dtype)
    given = {"max_steps": 5, "teacher": "ema", "per_device_train_batch_size": 2, **EVERY, **settings}
    trainer = tiny_trainer(out, model, **given)
    if resume is not None:
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def content(folder: Path) -> dict[str, bytes]:
    files = (folders.read_marker(folder) or {})["files"]
    return {name: (folder / name).read_bytes() for name in files if name not in OWN}


def step_of(checkpoint: Path) -> int:
    return int((folders.read_marker(checkpoint) or {})["step"])

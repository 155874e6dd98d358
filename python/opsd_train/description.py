"""What run.json says about how a run was made."""

import platform
from dataclasses import asdict, fields
from importlib.metadata import version
from typing import Any

from transformers import TrainingArguments

from opsd_train.adapters import TEACHER
from opsd_train.backbone import causal_lm
from opsd_train.config import OPSDConfig
from opsd_train.data.quarantine import count
from opsd_train.trainer import OPSDTrainer

PACKAGES = ("torch", "transformers", "peft", "accelerate", "opsd-kernels")


def describe(trainer: OPSDTrainer) -> dict[str, Any]:
    """What run.json says about how a run was made."""
    config = trainer.config
    inherited = {field.name for field in fields(TrainingArguments)}
    settings = {
        field.name: value
        for field in fields(config)
        if isinstance(value := getattr(config, field.name), str | int | float | dict)
        and (field.name not in inherited or value != field.default)
        and not field.name.endswith("_token")  # a hub token is nobody else's business
    }
    inner = causal_lm(trainer.student)
    return {
        "parameters": sum(one.numel() for name, one in inner.named_parameters() if TEACHER not in name),
        "objective": _minimised(config, trainer),
        "method": config.method,
        "teacher": str(config.to_teacher()),
        "config": settings,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES}
        | trainer.engine.versions,
        "device": str(trainer.args.device),
        "rows": {
            "training": len(trainer.prompts),
            "held_out": len(trainer.held_out),
            "set_aside": count(config.output_dir),
        },
    }


def _minimised(config: OPSDConfig, trainer: OPSDTrainer) -> dict[str, Any]:
    """The objective by its fields, or the method with the options that were given."""
    if config.method is None:
        return asdict(trainer.objective)
    return {"method": config.method, **dict(config.method_options or {})}  # type: ignore[arg-type]

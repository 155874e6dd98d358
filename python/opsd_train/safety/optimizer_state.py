"""The state of an optimizer, whole: of one process, or gathered from shards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from opsd_train.safety.student_files import read_student

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
SPREAD = StateDictOptions(full_state_dict=True, strict=False)


def set_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Go on from a state dictionary, bit for bit.

    `load_state_dict` alone would cast the state of a bf16 parameter to bf16, also where it was fp32.

    Raises:
        ValueError: it is the state of an optimizer over other parameters.
    """
    groups = optimizer.param_groups
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(group["params"]) for group in groups]:
        raise ValueError(
            "resume_from_checkpoint: expected an optimizer over groups of "
            f"{[len(group['params']) for group in groups]} parameters; got {sizes}"
        )
    optimizer.load_state_dict(dict(saved))
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        for name, value in saved["state"].get(index, {}).items():
            now = optimizer.state[parameter].get(name)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                optimizer.state[parameter][name] = value.to(now.device)


def full_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of a sharded model on the CPU of rank 0, empty elsewhere; called by every process."""
    return get_model_state_dict(model, options=WHOLE)  # type: ignore[return-value]


def full_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name on rank 0, empty elsewhere; called by every process."""
    return dict(get_optimizer_state_dict(model, optimizer, options=WHOLE))


def set_full_weights(student: torch.nn.Module, folder: Path) -> None:
    """Spread the weights in a checkpoint over the shards of a model; called by every process."""
    set_model_state_dict(student, read_student(student, folder), options=SPREAD)  # type: ignore[arg-type]


def set_full_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Spread what `full_state` returned over the shards; called by every process."""
    set_optimizer_state_dict(model, optimizer, saved, options=SPREAD)

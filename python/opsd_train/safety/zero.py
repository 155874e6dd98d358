"""ZeRO-3 of DeepSpeed: the state of its optimizer, whole, and steps that it leaves out."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper  # not in utils itself without DeepSpeed
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad

from opsd_train.safety.student_files import read_student
from opsd_train.sharding import is_main, state_of

MASTERS = "masters"


class WatchedEngine(DeepSpeedEngineWrapper):
    """The engine as accelerate drives it, which leaves out a step that one process alone knows to be bad.

    DeepSpeed leaves out a step whose gradient has no finite norm: weights, moments, the number of steps and
    the schedule stay as they were in every process. Only of the loss it knows nothing. So one number of the
    gradient is made not finite for the engine's step, and put back after it.

    Args:
        engine: of DeepSpeed.
        is_bad: whether a step is bad by the losses of any process, given that of the last micro-batch.
    """

    def __init__(self, engine: Any, is_bad: Callable[[Tensor], bool]) -> None:
        super().__init__(engine)
        self.is_bad = is_bad

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """The gradient of a micro-batch; after the last one of a step, the step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if not sync_gradients:
            return
        if self.is_bad(loss.detach()):
            self._leave_out()
        else:
            self.engine.step()

    def _leave_out(self) -> None:
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        trained = next(one for one in self.engine.module.parameters() if one.requires_grad)
        gradient = None
        if is_main():  # others' shares may be padding, over which no gradient would be written again
            gradient = safe_get_local_grad(trained).clone()
            spoilt = gradient.clone()
            spoilt.view(-1)[0] = torch.nan
            safe_set_local_grad(trained, spoilt)
        self.engine.step()
        if gradient is not None:
            safe_set_local_grad(trained, gradient)


def full_weights(model: Module) -> dict[str, Tensor]:
    """The weights on the CPU of rank 0, empty elsewhere; called by every process."""
    return state_of(model)


@torch.no_grad()
def full_state(model: Module, optimizer: Any) -> dict[str, Any]:
    """The optimizer's state by parameter name on rank 0, empty elsewhere; called by every process.

    One tensor at a time is whole on the devices. Of weights in less than fp32, `masters` has those in fp32.

    Args:
        model: not wrapped.
        optimizer: DeepSpeed's around that of torch.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state: dict[str, dict[str, Any]] = {}
    masters: dict[str, Tensor] = {}
    groups = [{key: one for key, one in group.items() if key != "params"} for group in optimizer.param_groups]
    for group in groups:
        group["params"] = []
    for number, flat, named in _parts(model, optimizer):
        held = optimizer.state.get(flat, {})
        for name, parameter in named.items():
            groups[optimizer.sub_group_to_group_id[number]]["params"].append(name)
            own = {key: _copied(one) for key, one in held.items() if not _is_like(one, flat)}
            for key in [key for key in held if key not in own]:  # in one order, for all processes
                own[key] = _kept(safe_get_full_optimizer_state(parameter, key))
            state[name] = own
            if parameter.dtype != flat.dtype:
                masters[name] = _kept(safe_get_full_fp32_param(parameter))
    if not is_main():
        return {}
    return {"state": state, "param_groups": groups, MASTERS: masters}


@torch.no_grad()
def set_full_weights(student: Module, folder: Path) -> None:
    """Spread the weights in a checkpoint over the processes; called by all of them."""
    import deepspeed

    saved = read_student(student, folder)
    for name, parameter in student.named_parameters(remove_duplicate=False):
        if name in saved:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if is_main():
                    parameter.copy_(saved[name])
            if parameter.requires_grad:
                deepspeed.utils.safe_set_local_fp32_param(parameter, _share(saved[name], parameter))
    for name, buffer in student.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])


@torch.no_grad()
def set_full_state(model: Module, optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Spread what `full_state` returned over the processes; called by all of them.

    Raises:
        ValueError: it is the state of an optimizer over other parameters.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    _check_names(model, optimizer, saved)
    for group, told in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: one for key, one in told.items() if key != "params"})
    for _, flat, named in _parts(model, optimizer):
        states = {name: saved["state"].get(name, {}) for name in named}
        fresh: dict[str, Any] = {}
        for key, example in next(iter(states.values())).items():
            spread = isinstance(example, Tensor) and all(
                states[name][key].shape == parameter.ds_shape for name, parameter in named.items()
            )
            fresh[key] = torch.zeros_like(flat) if spread else _copied(example)
        optimizer.state[flat] = fresh  # which it has from its first step on only
        for name, parameter in named.items():
            for key, value in states[name].items():
                if _is_like(fresh[key], flat):
                    safe_set_local_optimizer_state(parameter, _share(value, parameter), key)
            if name in saved.get(MASTERS, {}):
                safe_set_local_fp32_param(parameter, _share(saved[MASTERS][name], parameter))


def _parts(model: Module, optimizer: Any) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """What this process trains: number, fp32 values, and the parameters of which these are shares."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    for number, (parameters, flat) in enumerate(parts):
        yield number, flat, {names[id(one)]: one for one in parameters}


def _check_names(model: Module, optimizer: Any, saved: Mapping[str, Any]) -> None:
    now: list[set[str]] = [set() for _ in optimizer.param_groups]
    for number, _, named in _parts(model, optimizer):
        now[optimizer.sub_group_to_group_id[number]] |= named.keys()
    then = [set(group["params"]) for group in saved["param_groups"]]
    if then != now:
        raise ValueError(
            "resume_from_checkpoint: expected an optimizer over groups of "
            f"{[len(one) for one in now]} parameters of this model; got {[len(one) for one in then]}"
        )


def _is_like(value: Any, flat: Tensor) -> bool:
    """Whether it has a number for every one of a part."""
    return isinstance(value, Tensor) and value.shape == flat.shape


def _share(value: Tensor, parameter: Any) -> Tensor:
    """This process's share of a whole tensor, with zeros where the last ones end."""
    size, rank = parameter.ds_tensor.numel(), parameter.ds_zero_partition_rank
    mine = value.flatten()[rank * size : (rank + 1) * size]
    return pad(mine, (0, size - mine.numel())).to(parameter.ds_tensor.device)


def _kept(value: Tensor) -> Tensor:
    """On the CPU of rank 0; elsewhere nothing of it is kept."""
    return value.cpu().clone() if is_main() else value.new_empty(0)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value

"""The student's weights in a folder: all of a model, the adapters alone of a PEFT model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd_train.adapters import BESIDE, WEIGHTS, own_adapters


def write_student(
    student: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
    own_names: bool = False,
) -> None:
    """Write weights as safetensors, configuration and tokenizer, as `from_pretrained` reads them.

    Args:
        student: the model.
        tokenizer: goes with it.
        folder: exists and is empty.
        weights: all of the model's by name, where it holds shards of them; None takes its own.
        own_names: keep the names and layouts of the model in memory, for a file that goes on from it, and
            not those of published weights.
    """
    given = None if weights is None else dict(weights)
    if isinstance(student, PeftModel):
        student.save_pretrained(str(folder), state_dict=given, selected_adapters=own_adapters(student))
        state = student.state_dict() if given is None else given
        beside = {name: state[name].detach().cpu().contiguous() for name in _beside_adapters(student)}
        if beside:
            save_file(beside, folder / BESIDE)
    else:
        student.save_pretrained(folder, state_dict=given, save_original_format=not own_names)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


def read_student(student: torch.nn.Module, folder: Path) -> dict[str, Tensor]:
    """The weights that `write_student` wrote with `own_names`, by their names in the model's `state_dict`.

    Raises:
        ValueError: they are not those of this model.
    """
    if not isinstance(student, PeftModel):
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise ValueError(f"resume_from_checkpoint: expected model.safetensors in {folder}; got none")
        found = {name: one for path in files for name, one in load_file(path).items()}
        _check_shapes(found, _shapes(student), _once(student, found), folder)
        return found
    found = {}
    for adapter in own_adapters(student):
        path = (folder if adapter == "default" else folder / adapter) / WEIGHTS
        if not path.is_file():
            raise ValueError(f"resume_from_checkpoint: expected {path} for adapters; got none")
        names = _adapter_names(student, adapter)
        found |= {names.get(key, key): one for key, one in load_file(path).items()}
    beside = folder / BESIDE
    found |= load_file(beside) if beside.is_file() else {}
    _check_shapes(found, _shapes(student), _adapted(student) | _beside_adapters(student), folder)
    return found


def load_student(student: torch.nn.Module, folder: Path) -> None:
    """Put the weights that `write_student` wrote with `own_names` into the model; see `read_student`."""
    student.load_state_dict(read_student(student, folder), strict=False)


def _check_shapes(
    found: Mapping[str, Tensor], own: Mapping[str, tuple[int, ...]], needed: set[str], folder: Path
) -> None:
    shapes = {name: tuple(one.shape) for name, one in found.items()}
    wanted = {name: own[name] for name in needed}
    different = sorted(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"resume_from_checkpoint: expected {folder} to hold this model's weights; {name} is "
            f"{shapes.get(name, 'missing')} there and {wanted.get(name, 'missing')} in the model"
        )


def _shapes(student: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the model's weights by name; a weight that ZeRO-3 has partitioned says what its own was."""
    state = student.state_dict(keep_vars=True)
    return {name: tuple(getattr(one, "ds_shape", one.shape)) for name, one in state.items()}


def _once(student: torch.nn.Module, found: Mapping[str, Tensor]) -> set[str]:
    """Names of a model's weights; of those that are tied to each other the one that was written."""
    names = set(student.state_dict())
    own: dict[int, list[str]] = {}
    for name, parameter in student.named_parameters(remove_duplicate=False):
        own.setdefault(id(parameter), []).append(name)
    for tied in own.values():
        written = [name for name in tied if name in found] or tied[:1]
        names -= set(tied) - set(written)
    return names


def _adapter_names(student: PeftModel, adapter: str) -> dict[str, str]:
    """Names in the model's `state_dict` by those that PEFT writes."""
    own = list(student.state_dict())
    numbers = {name: torch.tensor(number) for number, name in enumerate(own)}
    written = get_peft_model_state_dict(student, state_dict=numbers, adapter_name=adapter)
    return {key: own[int(number)] for key, number in written.items()}


def _adapted(student: PeftModel) -> set[str]:
    return {name for one in own_adapters(student) for name in _adapter_names(student, one).values()}


def _beside_adapters(student: PeftModel) -> set[str]:
    """Trained parameters that PEFT does not write."""
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    return trained - _adapted(student)

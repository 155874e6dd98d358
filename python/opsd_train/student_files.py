"""The student's weights in a folder: all of a model, the adapters alone of a PEFT model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

ADAPTER = "adapter_model.safetensors"
BESIDE = "trained_beside_adapters.safetensors"


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
        student.save_pretrained(str(folder), state_dict=given)
        beside = _beside_adapters(student, given)
        if beside:
            save_file(beside, folder / BESIDE)
    else:
        student.save_pretrained(folder, state_dict=given, save_original_format=not own_names)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


def read_student(student: torch.nn.Module, folder: Path) -> dict[str, Tensor]:
    """The weights that `write_student` wrote with `own_names`, by the names of the model's parameters."""
    if not isinstance(student, PeftModel):
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise ValueError(f"resume_from_checkpoint: expected model.safetensors in {folder}; got none")
        return {name: one for path in files for name, one in load_file(path).items()}
    found: dict[str, Tensor] = {}
    for name in student.peft_config:
        path = (folder if name == "default" else folder / name) / ADAPTER
        if not path.is_file():
            raise ValueError(f"resume_from_checkpoint: expected {path} for adapters; got none")
        found |= {f"{name}/{key}": one for key, one in load_file(path).items()}
    return found | (load_file(folder / BESIDE) if (folder / BESIDE).is_file() else {})


def load_student(student: torch.nn.Module, folder: Path) -> None:
    """Put the weights that `write_student` wrote with `own_names` into the model.

    Raises:
        ValueError: they are not those of this model.
    """
    found = read_student(student, folder)
    if isinstance(student, PeftModel):
        for name in student.peft_config:
            prefix = f"{name}/"
            own = {key.removeprefix(prefix): one for key, one in found.items() if key.startswith(prefix)}
            _same_shapes(own, get_peft_model_state_dict(student, adapter_name=name), folder)
            set_peft_model_state_dict(student, own, adapter_name=name)
        found = {key: one for key, one in found.items() if "/" not in key}
        student.load_state_dict(found, strict=False)
        return
    state = student.state_dict()
    # A weight that is tied to another is in the file once.
    here = {state[name].data_ptr() for name in found if name in state}
    tied = {name: one for name, one in state.items() if name not in found and one.data_ptr() in here}
    _same_shapes(found, {name: one for name, one in state.items() if name not in tied}, folder)
    student.load_state_dict(found, strict=False)


def _same_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path) -> None:
    shapes = {name: tuple(one.shape) for name, one in found.items()}
    wanted = {name: tuple(one.shape) for name, one in expected.items()}
    different = sorted(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"resume_from_checkpoint: expected {folder} to hold this model's weights; {name} is "
            f"{shapes.get(name, 'missing')} there and {wanted.get(name, 'missing')} in the model"
        )


def _beside_adapters(student: PeftModel, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Trained parameters that PEFT does not write."""
    written = {
        one.data_ptr()
        for name in student.peft_config
        for one in get_peft_model_state_dict(student, adapter_name=name).values()
    }
    return {
        name: (one if weights is None else weights[name]).detach().cpu().contiguous()
        for name, one in student.named_parameters()
        if one.requires_grad and one.data_ptr() not in written
    }

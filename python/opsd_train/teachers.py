"""Where the teacher's weights come from: the start of training, this step, or an average of the steps."""

import copy
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from opsd_kernels import Hidden
from opsd_train.backbone import causal_lm, completion_hidden, head_source
from opsd_train.rollouts import evaluating

KINDS = ("initial", "live", "ema")
EMA_FILE = "ema_teacher.safetensors"


class Teacher:
    """The live teacher reads with the student's weights of this step; the other rules change which weights.

    Args:
        model: the model to read with; never trained through this class.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def source(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int) -> Hidden:
        """Hidden states of the completion positions with the teacher's own head, all constant."""
        with evaluating(self.model), self.weights():
            hidden = completion_hidden(self.model, input_ids, attention_mask, length)
            return head_source(self.model, hidden)

    def weights(self) -> AbstractContextManager[None]:
        """Inside, `model` has the teacher's weights."""
        return nullcontext()

    def after_optimizer_step(self) -> None:
        """Follow the student."""

    def save(self, checkpoint: str | os.PathLike[str]) -> None:
        """Write into a checkpoint's folder what a resumed run could not know."""

    def load(self, checkpoint: str | os.PathLike[str]) -> None:
        """Go on from what `save` wrote."""


class AdapterOffTeacher(Teacher):
    """The initial weights of a LoRA run whose adapters begin at zero: the same model with them off.

    Costs no memory.
    """

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Adapters are off inside."""
        assert isinstance(self.model, PeftModel)
        # PEFT turns adapters on again as trainable, also those that were frozen.
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)


class EmaTeacher(Teacher):
    """A moving average of the student: after each step, teacher = decay * teacher + (1 - decay) * student.

    The average is kept in fp32, because in bf16 a step of `1 - decay` would be rounded away. Of a LoRA model
    it is the average of the effective weights W + s B A: averaging A and B on their own would not be that of
    their product.

    Args:
        student: the model in training, as it is now.
        decay: in [0, 1).
    """

    def __init__(self, student: torch.nn.Module, decay: float) -> None:
        super().__init__(frozen_copy(student))
        self.student, self.decay = student, decay
        own = dict(self.model.named_parameters())
        self.read_by = {name: own[name] for name, _ in _effective_weights(student)}
        # The same storage where the model is fp32 already.
        self.average = {name: weight.data.float() for name, weight in self.read_by.items()}

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Move the average towards the student."""
        for name, weight in _effective_weights(self.student):
            self.average[name].lerp_(weight.to(self.average[name]), 1 - self.decay)
            self.read_by[name].copy_(self.average[name])

    def save(self, checkpoint: str | os.PathLike[str]) -> None:
        """Write the average, in fp32."""
        save_file({name: tensor.contiguous() for name, tensor in self.average.items()}, _file(checkpoint))

    def load(self, checkpoint: str | os.PathLike[str]) -> None:
        """Read the average; ValueError if it is not there or belongs to another model."""
        if not os.path.exists(_file(checkpoint)):
            raise ValueError(
                f"resume_from_checkpoint: expected {EMA_FILE} in {checkpoint}, for teacher 'ema'; got none"
            )
        saved = load_file(_file(checkpoint))
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in self.average.items()}:
            raise ValueError(
                f"resume_from_checkpoint: expected {_file(checkpoint)} to hold this model's weights"
            )
        with torch.no_grad():
            for name, tensor in saved.items():
                self.average[name].copy_(tensor)
                self.read_by[name].copy_(tensor)


def make_teacher(kind: str, student: torch.nn.Module, ema_decay: float) -> Teacher:
    """The teacher of that kind for a student as it is before training.

    The initial teacher of a LoRA student is the same model with its adapters off where they begin at zero, as
    fresh ones do, and else a frozen copy, which takes the model's memory once more.

    Raises ValueError for an unknown kind, and unless `initial` and `ema` can know all that a PEFT student
    trains: the parameters of LoRA layers, and no others.
    """
    if kind not in KINDS:
        raise ValueError(f"teacher: expected one of {', '.join(KINDS)}; got {kind!r}")
    if kind == "live":
        return Teacher(student)
    if isinstance(student, PeftModel):
        _require_lora_alone(kind, student)
    if kind == "ema":
        return EmaTeacher(student, ema_decay)
    if isinstance(student, PeftModel) and not _adapters_add(student):
        return AdapterOffTeacher(student)
    return Teacher(frozen_copy(student))


def frozen_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy that is never trained; a LoRA model's adapters are merged into its weights."""
    twin = copy.deepcopy(model)
    if isinstance(twin, PeftModel):
        twin = twin.merge_and_unload()
    return twin.eval().requires_grad_(False)


def _effective_weights(student: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight that training moves, with its name in the model without adapters."""
    if not isinstance(student, PeftModel):
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                yield name, parameter.data
        return
    for name, module in causal_lm(student).named_modules():
        if isinstance(module, LoraLayer):
            if any(module.use_dora.values()):
                raise ValueError("teacher: expected 'initial' or 'live' for a model with DoRA, got 'ema'")
            weight: torch.Tensor = module.get_base_layer().weight.data  # type: ignore[assignment]
            for delta in _deltas(module):
                weight = weight + delta.to(weight.dtype)
            yield f"{name}.weight", weight


def _deltas(layer: LoraLayer) -> Iterator[torch.Tensor]:
    """What each active adapter adds to the layer's weight."""
    for adapter in layer.active_adapters:
        if adapter in layer.scaling:
            yield layer.get_delta_weight(adapter)  # type: ignore[attr-defined]


@torch.no_grad()
def _adapters_add(student: PeftModel) -> bool:
    layers = (module for module in student.modules() if isinstance(module, LoraLayer))
    return any(bool(delta.any()) for layer in layers for delta in _deltas(layer))


def _require_lora_alone(kind: str, student: PeftModel) -> None:
    """Adapters off are not the initial weights, nor merged ones the average, if anything else is trained."""
    of_lora = {
        parameter
        for module in student.modules()
        if isinstance(module, LoraLayer)
        for name, part in module.named_children()
        if name != "base_layer"
        for parameter in part.parameters()
    }
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter not in of_lora:
            raise ValueError(
                f"teacher: expected a PEFT model that trains LoRA adapters alone, for {kind!r}; it trains "
                f"{name} too; freeze it, or use teacher 'live'"
            )


def _file(checkpoint: str | os.PathLike[str]) -> str:
    return os.path.join(checkpoint, EMA_FILE)

"""Where the teacher's weights come from: the start of training, this step, those between, or elsewhere."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from opsd_kernels import Hidden, LogLinear, TopK
from opsd_train.adapters import ADAPTED, add_frozen_copy
from opsd_train.backbone import causal_lm, check_padding, completion_hidden, head_source
from opsd_train.loading import load
from opsd_train.rollouts import evaluating
from opsd_train.safety import stops
from opsd_train.sharding import is_main, is_sharded, part_of, reshard, whole
from opsd_train.teachers.effective import adapters_add, effective_weights, frozen_copy, require_lora_alone
from opsd_train.teachers.rule import TeacherRule
from opsd_train.teachers.served import ServedReader

EMA_FILE = "ema_teacher.safetensors"
SYNC_FILE = "sync_teacher.safetensors"


class Teacher:
    """The live teacher reads with the student's weights of this step; the other rules change which weights.

    Args:
        model: the model to read with; never trained through this class.
    """

    is_whole = True  # its distributions are known at every entry

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def source(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int
    ) -> Hidden | LogLinear:
        """Hidden states of the completion positions with the teacher's own head, all constant."""
        with evaluating(self.model), self.weights():
            hidden = completion_hidden(self.model, input_ids, attention_mask, length)
            return head_source(self.model, hidden)

    def beside(
        self, student: Hidden | LogLinear, inputs: Mapping[str, torch.Tensor], length: int
    ) -> Hidden | LogLinear | TopK:
        """What the teacher says of a batch whose student is known; only a served one makes use of that."""
        return self.source(inputs["teacher_input_ids"], inputs["teacher_attention_mask"], length)

    def weights(self) -> AbstractContextManager[None]:
        """Inside, `model` has the teacher's weights."""
        return nullcontext()

    def place(self, adopt: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
        """Put a copy of its own where the student is; `adopt` leaves the student itself as it is."""
        self.model = adopt(self.model)

    def after_optimizer_step(self) -> None:
        """Follow the student."""

    def save(self, checkpoint: str | os.PathLike[str]) -> None:
        """Write into a checkpoint's folder what a resumed run could not know; called by every process."""

    def load(self, checkpoint: str | os.PathLike[str]) -> None:
        """Go on from what `save` wrote."""


class ServedTeacher(Teacher):
    """A model behind a vLLM server, asked about the student's most likely tokens.

    Args:
        model: the student, whose weights are none of its business.
        reader: asks the server.
    """

    is_whole = False

    def __init__(self, model: torch.nn.Module, reader: ServedReader) -> None:
        super().__init__(model)
        self.reader = reader

    def source(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int) -> Hidden:
        """ValueError: it has no hidden states here."""
        raise ValueError("teacher: expected one whose weights are here, not a served one, for this use")

    def beside(self, student: Hidden | LogLinear, inputs: Mapping[str, torch.Tensor], length: int) -> TopK:
        """Its log-probs of the student's most likely tokens."""
        # A model that is sharded cannot be left, and then be saved, in the middle of its forward pass.
        with stops.deferred() if is_sharded(self.model) else stops.agreed():
            return self.reader.read(student, inputs)


class AdapterTeacher(Teacher):
    """The initial weights of a LoRA run: the same model with other adapters on, or with none.

    Costs no memory where the student's adapters begin at zero, and else that of a frozen copy of them.
    Merging them would round the weights.

    Args:
        model: the student.
        name: of the copy, see `add_frozen_copy`; None for adapters off.
    """

    def __init__(self, model: PeftModel, name: str | None = None) -> None:
        super().__init__(model)
        self.name = name

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The student's adapters are off inside, and the copy is on."""
        # Not `disable_adapter` and `set_adapter`, which change what is trained: FSDP2 asks a parameter once
        # whether it is trained, and that may be inside.
        layers = [module for module in self.model.modules() if isinstance(module, ADAPTED)]
        states = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = self.name is None
                layer._active_adapter = layer._active_adapter if self.name is None else [self.name]
            yield
        finally:
            for layer, (off, active) in zip(layers, states, strict=True):
                layer._disable_adapters, layer._active_adapter = off, active


class EmaTeacher(Teacher):
    """A moving average of the student: teacher = decay * teacher + (1 - decay) * student at every update.

    The average is kept in fp32, because in bf16 a step of `1 - decay` would be rounded away. Of a LoRA model
    it is the average of the effective weights W + s B A: averaging A and B on their own would not be that of
    their product.

    Args:
        student: the model in training, as it is now.
        decay: in [0, 1); 0 copies the student and needs no fp32.
        every: optimizer steps from one update to the next.
        copy_every: optimizer steps after which the average is the student itself; 0 for never.
    """

    file = EMA_FILE

    def __init__(self, student: torch.nn.Module, decay: float, every: int = 1, copy_every: int = 0) -> None:
        super().__init__(frozen_copy(student))
        self.student, self.decay, self.every, self.copy_every = student, decay, every, copy_every
        self.steps = 0
        self.names = [name for name, _ in effective_weights(student)]
        self._own()

    def place(self, adopt: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
        """See `Teacher.place`; the average is sharded like the weights it is the average of."""
        super().place(adopt)
        self._own()

    def _own(self) -> None:
        """Find the weights that follow, and begin their average with what they are."""
        own = dict(self.model.named_parameters())
        self.read_by = {name: own[name] for name in self.names}
        # The same storage where no wider one is needed.
        self.average = {
            name: weight.data.float() if self.decay else weight.data for name, weight in self.read_by.items()
        }

    def after_optimizer_step(self) -> None:
        """Move the average towards the student if this is a step to do so."""
        self.steps += 1
        if self.copy_every and self.steps % self.copy_every == 0:
            self._follow(0.0)
        elif self.steps % self.every == 0:
            self._follow(self.decay)

    @torch.no_grad()
    def _follow(self, decay: float) -> None:
        reshard(self.model)
        for name, weight in effective_weights(self.student):
            self.average[name].lerp_(weight.to(self.average[name]), 1 - decay)
            self.read_by[name].copy_(self.average[name])

    def save(self, checkpoint: str | os.PathLike[str]) -> None:
        """Write the average as it is kept, whole, and the number of steps."""
        tensors = {name: whole(tensor).contiguous() for name, tensor in self.average.items()}
        if is_main():
            save_file(tensors, os.path.join(checkpoint, self.file), metadata={"steps": str(self.steps)})

    def load(self, checkpoint: str | os.PathLike[str]) -> None:
        """Read what `save` wrote; ValueError if it is not there or belongs to another model."""
        path = os.path.join(checkpoint, self.file)
        if not os.path.exists(path):
            kind = self.file.removesuffix("_teacher.safetensors")
            raise ValueError(
                f"resume_from_checkpoint: expected {self.file} in {checkpoint}, for teacher {kind!r}; "
                "got none"
            )
        saved = load_file(path)
        with safe_open(path, framework="pt") as file:
            steps = (file.metadata() or {}).get("steps", "")
        same = {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in self.average.items()}
        if not same or not steps.isdecimal():
            raise ValueError(f"resume_from_checkpoint: expected {path} to hold this model's weights")
        self.steps = int(steps)
        with torch.no_grad():
            for name, tensor in saved.items():
                part = part_of(tensor, self.average[name])
                self.average[name].copy_(part)
                self.read_by[name].copy_(part)


class SyncTeacher(EmaTeacher):
    """A copy of the student that is renewed every so many optimizer steps (2605.10194)."""

    file = SYNC_FILE

    def __init__(self, student: torch.nn.Module, every: int) -> None:
        super().__init__(student, decay=0.0, every=every)


class TrustRegionTeacher(Teacher):
    """Logits `(1 - share) * reference + share * live`, both reading the teacher's prompt (2601.20802).

    That is the geometric mixture of the two distributions. With LoRA over the base model both streams have
    the same head, and the mixture costs one product with it.

    Args:
        reference: the initial teacher.
        student: the model in training.
        share: of the student, in [0, 1].
    """

    def __init__(self, reference: Teacher, student: torch.nn.Module, share: float) -> None:
        super().__init__(student)
        self.reference, self.share = reference, share

    def place(self, adopt: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
        """See `Teacher.place`."""
        self.reference.place(adopt)

    def source(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int) -> LogLinear:
        """Both streams at the completion's positions, all constant."""
        anchored = self.reference.source(input_ids, attention_mask, length)
        live = super().source(input_ids, attention_mask, length)
        return LogLinear([(1 - self.share, anchored), (self.share, live)])


def make_teacher(
    rule: TeacherRule, student: torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None = None
) -> Teacher:
    """The teacher of that rule for a student as it is before training.

    The initial teacher is the student as it is given, adapters included. Of a LoRA student that is the same
    model with its adapters off where they begin at zero, as fresh ones do, and else with a frozen copy of
    them; of a student with several adapters on, or none, a frozen copy of the model.

    Raises ValueError unless a teacher that copies weights can know all that a PEFT student trains (the
    parameters of LoRA layers, and no others), and for another model that does not share the tokenizer.
    """
    if rule.kind == "live":
        return Teacher(student)
    if rule.served is not None:
        if tokenizer is None:
            raise ValueError("teacher: expected a tokenizer for a served one, got none")
        return ServedTeacher(student, ServedReader(rule.served, tokenizer))
    if rule.model is not None:
        return Teacher(load_teacher(rule.model, student, tokenizer))
    if isinstance(student, PeftModel):
        require_lora_alone(rule.kind, student)
    if rule.kind == "ema":
        return EmaTeacher(student, rule.decay, rule.every, rule.copy_every)
    if rule.kind == "sync":
        return SyncTeacher(student, rule.every)
    initial = _initial(student)
    return TrustRegionTeacher(initial, student, rule.share) if rule.kind == "trust_region" else initial


def _initial(student: torch.nn.Module) -> Teacher:
    """The student as it is now, in as little memory as can be."""
    if isinstance(student, PeftModel):
        if not adapters_add(student):
            return AdapterTeacher(student)
        name = add_frozen_copy(student)
        if name is not None:
            return AdapterTeacher(student, name)
    return Teacher(frozen_copy(student))


def load_teacher(
    path: str, student: torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None
) -> torch.nn.Module:
    """Another causal language model as the teacher, frozen, in the student's dtype and on its device.

    Raises ValueError unless its tokenizer gives every token the id that the student's gives it.
    """
    inner = causal_lm(student)
    model, own = load(path, str(inner.dtype).removeprefix("torch."))
    if tokenizer is not None and own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"teacher_model: expected a tokenizer with the student's vocabulary at {path!r}; "
            f"got {len(own.get_vocab())} tokens that are not the student's {len(tokenizer.get_vocab())}"
        )
    model.to(inner.device).eval().requires_grad_(False)  # type: ignore[arg-type]
    check_padding(model)
    return model

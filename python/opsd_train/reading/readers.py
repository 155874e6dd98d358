"""One batch as the student and as every teacher of a method reads it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import opsd_kernels
from opsd_kernels import Hidden, LogLinear
from opsd_train.backbone import completion_hidden, head_source
from opsd_train.method import FROZEN, MethodRun
from opsd_train.rollouts import check_alignment
from opsd_train.teachers.rule import TeacherRule
from opsd_train.teachers.weights import Teacher, make_teacher
from opsd_train.watch.phases import Phase, untimed


class Readers:
    """The weights with which the roles of a method read.

    Args:
        method: whose roles they are.
        student: the model in training, as it is before.
        teacher: the run's teacher, which reads every role but those of the initial weights.
        rule: the teacher's.
    """

    def __init__(
        self, method: MethodRun, student: torch.nn.Module, teacher: Teacher, rule: TeacherRule
    ) -> None:
        self.method, self.teacher = method, teacher
        self.initial = teacher
        if rule.kind != "initial" and any(role in FROZEN for role in method.roles.contexts):
            self.initial = make_teacher(TeacherRule("initial"), student)

    def place(self, adopt: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
        """See `Teacher.place`; the run's teacher is placed already."""
        if self.initial is not self.teacher:
            self.initial.place(adopt)

    def read(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Tensor],
        temperature: float,
        step: int = 0,
        phase: Phase = untimed,
    ) -> tuple[Hidden, dict[str, Any], dict[str, Tensor]]:
        """The student, the loss's teachers by role, and its columns of data; `phase` times who reads.

        Raises ValueError for a batch in which they do not read the same completions.
        """
        mask = inputs["completion_mask"].bool()
        length = mask.shape[1]
        token_ids = inputs["input_ids"][:, -length:]
        known: dict[str, Any] = {"token_ids": token_ids, "mask": mask, "temperature": temperature}
        sources: dict[str, Hidden | LogLinear] = {}

        def source(role: str) -> Hidden | LogLinear:
            if role not in sources:
                with phase("teacher"):
                    sources[role] = self._source(role, inputs, length)
            return sources[role]

        with phase("student"):
            hidden = completion_hidden(model, inputs["input_ids"], inputs["attention_mask"], length)
        student = head_source(model, hidden)

        def own() -> Tensor:
            return logprobs_of(student, **known)

        def score(role: str) -> Tensor:
            return logprobs_of(source(role), **known)

        with phase("loss"):
            data = self.method.scored(inputs, score, own)
        return student, {role: source(role) for role in self.method.recipe(step).roles}, data

    def _source(self, role: str, inputs: Mapping[str, Tensor], length: int) -> Hidden | LogLinear:
        ids, mask = inputs[f"{role}_input_ids"], inputs[f"{role}_attention_mask"]
        check_alignment(
            {
                "input_ids": inputs["input_ids"],
                "attention_mask": inputs["attention_mask"],
                "completion_mask": inputs["completion_mask"],
                "teacher_input_ids": ids,
                "teacher_attention_mask": mask,
            }
        )
        reader = self.initial if role in FROZEN else self.teacher
        return reader.source(ids, mask, length)


@torch.no_grad()
def logprobs_of(source: Hidden | LogLinear, token_ids: Tensor, **options: Any) -> Tensor:
    """Log-probs `[B, C]` of the tokens `[B, C]`, 0 at those that do not count.

    Args:
        source: who reads them.
        token_ids: the tokens.
        options: `mask` and `temperature`, as `opsd_kernels.loss` takes them.
    """
    if isinstance(source, Hidden):
        return opsd_kernels.token_logprobs(source, token_ids, **options)
    one = source.streams[0][1]
    return opsd_kernels.token_stats(one, source, token_ids=token_ids, **options).teacher_logprob

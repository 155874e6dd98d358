"""The controller of exposure in a run: it sets a step's contexts, and hears what the step brought."""

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from opsd_train.data.columns import Step
from opsd_train.method import MethodRun
from opsd_train.pieces.exposure import Exposure, ExposureSettings
from opsd_train.reading.contexts import Context
from opsd_train.reading.readers import logprobs_of
from opsd_train.reading.roles import Roles, collate_role
from opsd_train.teachers.weights import Teacher

CONTEXT = "partial_solution"


class ExposedTeacher:
    """Shows a method's teachers the share of the solution that the controller chose (ATESD, 2605.11458).

    The controller's reward has two parts: by how much the loss fell, and the mean log-probability of the
    reference solution's tokens (at temperature 1, without an end of sequence) as the first teacher with a
    partial solution reads them behind its context, over the rows that it has something to tell. That takes
    one more forward pass of the teacher a step, which `"reference": 0` in the settings saves; the term is 0
    then, and in a step in which no row tells anything.

    Args:
        settings: of the controller.
        method: whose contexts change.
        teacher: reads the reference.

    Raises:
        ValueError: no role reads a partial solution.
    """

    def __init__(self, settings: ExposureSettings, method: MethodRun, teacher: Teacher) -> None:
        contexts = method.roles.contexts
        self.roles = [role for role, one in contexts.items() if one.name == CONTEXT]
        if not self.roles:
            held = ", ".join(one.name for one in contexts.values()) or "none"
            raise ValueError(f"exposure: expected a role with the context {CONTEXT!r}; got {held}")
        self.controller = Exposure(settings)
        self.method, self.teacher = method, teacher
        self._loss: torch.Tensor | None = None
        self._reference = 0.0

    def exposed(self) -> MethodRun:
        """The method with the contexts of the coming step."""
        contexts = dict(self.method.roles.contexts)
        for role in self.roles:
            options = {**contexts[role].options, "alpha": self.controller.alpha}
            contexts[role] = Context(CONTEXT, options)
        return replace(self.method, roles=Roles(contexts))

    def read(self, step: Step, pad_id: int) -> None:
        """Let the teacher judge the references of a step's rows, as it reads them in this step."""
        self._loss = None
        if self.controller.settings.reference == 0:
            return
        reading = step.readings[self.roles[0]]
        chosen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for rollout, ids, told in zip(step.rollouts, reading.ids, reading.privileged, strict=True):
            solution = rollout.prompt.row and rollout.prompt.row.columns.get("solution")
            if told and isinstance(solution, str):
                found = self.method.encoder.tokenizer(solution, add_special_tokens=False)["input_ids"]
                chosen[rollout.prompt.where] = (ids, tuple(found))
        self._reference = mean_logprob(self.teacher, list(chosen.values()), pad_id) if chosen else 0.0

    def hear(self, loss: torch.Tensor) -> None:
        """Add the loss of a part of the step."""
        self._loss = loss if self._loss is None else self._loss + loss

    def after_optimizer_step(self) -> None:
        """Tell the controller how the step went."""
        if self._loss is not None:
            self.controller.observe(self._loss.item(), self._reference)

    def metrics(self) -> dict[str, float]:
        """`exposure`, the share of the next step."""
        return {"exposure": self.controller.alpha}

    def save(self, checkpoint: str | os.PathLike[str]) -> None:
        """See `Exposure.save`."""
        self.controller.save(checkpoint)

    def load(self, checkpoint: str | os.PathLike[str]) -> None:
        """See `Exposure.load`."""
        self.controller.load(checkpoint)


def mean_logprob(
    teacher: Teacher, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], pad_id: int
) -> float:
    """Mean over all tokens of the answers in pairs (prompt, answer) of their log-probs under the teacher."""
    answers = [answer for _, answer in pairs]
    length = max(map(len, answers))
    device = next(teacher.model.parameters()).device
    batch = collate_role("teacher", [prompt for prompt, _ in pairs], answers, pad_id)
    ids, mask = (batch[f"teacher_{name}"].to(device) for name in ("input_ids", "attention_mask"))
    live = mask[:, -length:].bool()
    found = logprobs_of(teacher.source(ids, mask, length), ids[:, -length:], mask=live)
    return found.double().sum().item() / max(int(live.sum()), 1)

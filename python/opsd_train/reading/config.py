"""The part of a run's configuration that says who thinks before answering."""

from dataclasses import dataclass

from opsd_train.fields import json_object, option
from opsd_train.reading.thinking import SWITCH


@dataclass
class ThinkingConfig:
    """The two switches; None leaves the chat template's own default."""

    student_thinking: bool | None = option(
        None,
        "Whether the student's chat template lets it think (`enable_thinking`); None says nothing.",
    )
    teacher_thinking: bool | None = option(
        None, "Whether the teacher's chat template lets it think; the two need not agree."
    )

    def check_thinking(self) -> None:
        """Put the switches into the chat_kwargs of their readers; ValueError where those say otherwise."""
        for reader in ("student", "teacher"):
            name, wanted = f"{reader}_chat_kwargs", getattr(self, f"{reader}_thinking")
            given = json_object(name, getattr(self, name, None) or {})
            if wanted is not None and given.get(SWITCH, wanted) is not wanted:
                raise ValueError(
                    f"{reader}_thinking: expected what {name} says, {given[SWITCH]!r}; got {wanted}"
                )
            setattr(self, name, given if wanted is None else given | {SWITCH: wanted})

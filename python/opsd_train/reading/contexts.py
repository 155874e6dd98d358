"""What the teacher is told: builders of its message from a row's columns and the rollouts of the step.

A builder gives the text of the teacher's last message, or None where it finds nothing to tell: that row is
not privileged. Most fill a template, in which `{problem}` is the problem, `{prompt}` the message that the
student reads, and the names beside it what the builder found.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opsd_kernels.registry import Registry
from opsd_train.reading.context_templates import (
    ANSWER,
    BOTH,
    CRITIQUE,
    DEBATE,
    DEMONSTRATION,
    FEEDBACK,
    FOLLOW_UP,
    HINT,
    PARTIAL,
    REPHRASE,
    RETRY,
    REVISION,
    RUBRIC,
    SKILL,
)
from opsd_train.reading.prompts import CONTEXT_TEMPLATE, TEACHER_TEMPLATE, Message, fill
from opsd_train.reading.texts import final_answer, steps, without_thoughts


@dataclass(frozen=True)
class Attempt:
    """A rollout as text, its reward in [0, 1], and what it says beside its thoughts."""

    text: str
    reward: float
    said: str | None = None

    @property
    def spoken(self) -> str:
        """The text without its thoughts: `said`, or what is left without the usual markers."""
        return without_thoughts(self.text) if self.said is None else self.said


@dataclass(frozen=True)
class Known:
    """All that a context can be made from.

    Args:
        problem: the problem's text.
        prompt: the last message that the student reads.
        columns: the row's columns by name; those that a builder reads hold a text or a list of texts.
        own: the rollout itself.
        siblings: the other rollouts of the same prompt, in their order.
    """

    problem: str
    prompt: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    own: Attempt | None = None
    siblings: tuple[Attempt, ...] = ()

    def text(self, column: str, index: int = 0) -> str | None:
        """One text of a column, None where there is none; a single text counts as a list of one."""
        texts = self.texts(column)
        return texts[index] if index < len(texts) and texts[index].strip() else None

    def texts(self, column: str) -> Sequence[str]:
        """All texts of a column; ValueError for one that holds anything else."""
        held = self.columns.get(column)
        texts = [] if held is None else [held] if isinstance(held, str) else held
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{column}: expected a text or a list of texts; got {held!r}")
        return texts

    @property
    def answer(self) -> str | None:
        """The column `answer`, else the final answer that the column `solution` states."""
        return self.text("answer") or final_answer(self.text("solution") or "")

    def filled(self, template: str, **found: str | None) -> str | None:
        """The template with what was found, None if any of it was not."""
        present = {name: text for name, text in found.items() if text is not None}
        if len(present) < len(found):
            return None
        for name in found:
            if f"{{{name}}}" not in template:
                raise ValueError(f"template: expected a template with {{{name}}}; got {template!r}")
        return fill(template, problem=self.problem, prompt=self.prompt, **present)


Builder = Callable[..., str | None]
context: Registry[Builder] = Registry("context")


@dataclass(frozen=True)
class Context:
    """A builder by name with its options; ValueError for what does not exist."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = inspect.signature(context[self.name]).parameters
        taken = [name for name, one in known.items() if one.kind is inspect.Parameter.KEYWORD_ONLY]
        for option in self.options:
            if option not in taken:
                among = ", ".join(taken) or "none"
                raise ValueError(f"context {self.name}: expected options among {among}; got {option!r}")

    def __call__(self, known: Known) -> str | None:
        """The teacher's message, None for a row that is not privileged."""
        return context[self.name](known, **self.options)

    @property
    def on_policy(self) -> bool:
        """Whether the message may depend on the rollouts of the step."""
        return self.name in ON_POLICY


def teacher_messages(student: Sequence[Message], text: str) -> tuple[Message, ...]:
    """The student's messages with another text in the last one."""
    return (*student[:-1], {**student[-1], "content": text})


@context
def plain(known: Known) -> str | None:
    """What the student reads: a teacher without privileged information."""
    return known.prompt


@context
def full_solution(known: Known, *, template: str = TEACHER_TEMPLATE) -> str | None:
    """The reference solution (2601.18734)."""
    return known.filled(template, solution=known.text("solution"))


@context
def privileged_context(known: Known, *, template: str = CONTEXT_TEMPLATE) -> str | None:
    """Whatever the column of that name holds."""
    return known.filled(template, privileged_context=known.text("privileged_context"))


@context
def answer_only(known: Known, *, template: str = ANSWER) -> str | None:
    """The final answer without its derivation."""
    return known.filled(template, answer=known.answer)


@context
def partial_solution(
    known: Known, *, alpha: float = 0.5, template: str = PARTIAL, answer_template: str | None = None
) -> str | None:
    """The first `floor(alpha m)` of the solution's m steps and the final answer (2605.11458).

    With no step to show, the answer alone through `answer_template`: `answer_only`'s, or a template of the
    run's own with nothing for its steps. None without an answer. A template without `{answer}` shows the
    steps alone (2605.20643).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a share in [0, 1]; got {alpha}")
    parts = steps(known.text("solution") or "")
    shown = parts[: int(alpha * len(parts) + 1e-9)]  # 0.29 * 100 is 29 steps, whatever the rounding
    end = {"answer": known.answer} if "{answer}" in template else {}
    if not shown:
        if answer_template is None and template != PARTIAL:
            return known.filled(template, steps="", **end) if end else None
        return known.filled(answer_template or ANSWER, **end) if end else None
    return known.filled(template, steps="\n\n".join(shown), **end)


@context
def rubric(known: Known, *, template: str = RUBRIC) -> str | None:
    """The criteria by which a response is judged (2606.19327)."""
    return known.filled(template, rubric=known.text("rubric"))


@context
def feedback(known: Known, *, template: str = FEEDBACK) -> str | None:
    """Feedback of an environment or a person on an attempt (2601.20802)."""
    return known.filled(template, feedback=known.text("feedback"))


@context
def skill(known: Known, *, index: int = 0, template: str = SKILL) -> str | None:
    """A retrieved skill (2604.10674); `index` picks one where the column holds several (2605.28791)."""
    return known.filled(template, skill=known.text("skill", index))


@context
def hint(known: Known, *, index: int = 0, template: str = HINT) -> str | None:
    """A hint; `index` picks one where the column holds several."""
    return known.filled(template, hint=known.text("hint", index))


@context
def follow_up(known: Known, *, template: str = FOLLOW_UP) -> str | None:
    """The message with which the user went on: what the response should have been, in hindsight."""
    return known.filled(template, follow_up=known.text("follow_up"))


@context
def debate(known: Known, *, template: str = DEBATE) -> str | None:
    """The transcript of a debate between teachers (2605.01347)."""
    return known.filled(template, debate=known.text("debate"))


@context
def wrong_answer(known: Known, *, threshold: float = 0.5, template: str = ANSWER) -> str | None:
    """A wrong answer told as if it were right: the negative to `answer_only` (2605.19436).

    From the column `wrong_answer`, else the final answer of the first rollout of the group with a reward
    below the threshold that does not state the right one; the rollout itself comes last.
    """
    told, right = known.text("wrong_answer"), known.answer
    own = () if known.own is None else (known.own,)
    for attempt in (*known.siblings, *own):
        stated = final_answer(attempt.text) if attempt.reward < threshold else None
        if told is None and stated != right:
            told = stated
    return known.filled(template, answer=told)


@context
def sibling(
    known: Known,
    *,
    index: int = 0,
    threshold: float = 0.5,
    own_success: bool = False,
    with_feedback: str = "never",
    thoughts: bool = False,
    template: str = DEMONSTRATION,
    feedback_template: str = FEEDBACK,
) -> str | None:
    """A successful rollout of the same prompt as a demonstration (2601.20802).

    Args:
        known: what there is.
        index: which success is shown, in the order of the rollouts; several roles can show different ones.
        threshold: least reward of a success.
        own_success: whether a rollout that succeeded may be its own demonstration, where no sibling is.
        with_feedback: when the column `feedback` is told too: `never`, `without` one, or `always`.
        thoughts: whether thoughts, in any markers of the chat template, stay in the demonstration.
        template: the message with a demonstration and no feedback.
        feedback_template: the message with feedback and no demonstration.
    """
    if with_feedback not in ("never", "without", "always"):
        raise ValueError(f"with_feedback: expected never, without or always; got {with_feedback!r}")
    shown = [*known.siblings, *([known.own] if own_success and known.own is not None else [])]
    texts = [one.text if thoughts else one.spoken for one in shown if one.reward >= threshold]
    successes = [text for text in texts if text.strip()]
    demonstration = successes[index] if index < len(successes) else None
    said = None if with_feedback == "never" else known.text("feedback")
    if demonstration is None:
        return known.filled(feedback_template, feedback=said)
    if said is not None and with_feedback == "always":
        return known.filled(BOTH, demonstration=demonstration, feedback=said)
    return known.filled(template, demonstration=demonstration)


@context
def wrong_sibling(known: Known, *, threshold: float = 0.5, template: str = DEMONSTRATION) -> str | None:
    """An unsuccessful rollout of the same prompt, told as `sibling` tells a success (2606.11709)."""
    texts = [one.spoken for one in known.siblings if one.reward < threshold and one.spoken.strip()]
    return known.filled(template, demonstration=texts[0] if texts else None)


@context
def revision(
    known: Known,
    *,
    threshold: float = 0.5,
    rephrase: str = REPHRASE,
    retry: str = RETRY,
    template: str = REVISION,
) -> str | None:
    """The rollout itself and a control prompt chosen by its reward (2604.12002)."""
    if known.own is None:
        return None
    control = rephrase if known.own.reward >= threshold else retry
    return known.filled(template, attempt=known.own.text, control=control)


@context
def critique(known: Known, *, template: str = CRITIQUE) -> str | None:
    """The column `critique`; a list of them is set step by step under the rollout's own steps.

    A step without a critique stands alone; critiques without a step are left out.
    """
    if isinstance(known.columns.get("critique"), str):
        return known.filled(template, critique=known.text("critique"))
    parts, any_said = [], False
    for index, step in enumerate(steps(known.own.text) if known.own is not None else []):
        said = known.text("critique", index)
        parts.append(f"Step {index + 1}: {step}" + (f"\nCritique: {said}" if said else ""))
        any_said |= said is not None
    return known.filled(template, critique="\n\n".join(parts) if any_said else None)


ON_POLICY = frozenset({"wrong_answer", "sibling", "wrong_sibling", "revision", "critique"})

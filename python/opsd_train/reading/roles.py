"""The prompts of a teacher that reads in several roles: from contexts to token ids to tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from opsd_train.data.rows import Row
from opsd_train.reading.contexts import Attempt, Context, Known, teacher_messages
from opsd_train.reading.prompts import Encoder, Message, pad_left, pad_right

# Contexts whose template is an option of its own, unless `context_templates` has another.
OWN_TEMPLATES = {"full_solution": "teacher_template or ", "privileged_context": "context_template or "}

REHEARSED = 64  # steps of a rollout that a context is tried on


@dataclass(frozen=True)
class Reading:
    """What one role reads in each row.

    Args:
        ids: the prompt of each row; the student's own in a row that is not privileged.
        privileged: whether the context of that row told anything.
        too_long: rows whose context may depend on rollouts and broke its budget: not privileged either.
    """

    ids: tuple[tuple[int, ...], ...]
    privileged: tuple[bool, ...]
    too_long: int


@dataclass(frozen=True)
class Roles:
    """Which context each role of a method's teachers reads.

    Args:
        contexts: role -> context; the role `teacher` is the one that `collate` fills and the loss reads.
    """

    contexts: Mapping[str, Context]

    @property
    def on_policy(self) -> bool:
        """Whether any context may depend on the rollouts of the step."""
        return any(context.on_policy for context in self.contexts.values())

    @property
    def needs_siblings(self) -> bool:
        """Whether a context can tell nothing where a prompt has one rollout."""
        shown = [one.options for one in self.contexts.values() if one.name in ("sibling", "wrong_sibling")]
        return any(
            not one.get("own_success") and one.get("with_feedback", "never") == "never" for one in shown
        )

    def read(
        self, rows: Sequence[Row], encoder: Encoder, attempts: Sequence[Attempt] | None = None
    ) -> dict[str, Reading]:
        """What every role reads, one entry per row.

        Args:
            rows: one per rollout; equal rows, wherever they stand, are rollouts of the same prompt.
            encoder: tokenises, with the budget of a teacher's prompt.
            attempts: the rollouts of the rows; without them only contexts that need none tell anything.

        Raises:
            ValueError: a column holds something else than text, or a context made from columns is longer than
                its budget.
        """
        known = all_known(rows, attempts)
        return {role: _read(context, rows, known, encoder) for role, context in self.contexts.items()}


def group_ids(rows: Sequence[Row]) -> list[int]:
    """An integer per row that rollouts of the same prompt share, counted from 0 in order of appearance."""
    seen: dict[str, int] = {}
    return [seen.setdefault(row.where, len(seen)) for row in rows]


def all_known(rows: Sequence[Row], attempts: Sequence[Attempt] | None = None) -> list[Known]:
    """What contexts can be made from, for each row with its rollout and those of the same prompt."""
    found = [Known(row.problem, row.student[-1]["content"], row.columns) for row in rows]
    if attempts is None:
        return found
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups := group_ids(rows)):
        members.setdefault(group, []).append(index)
    return [
        replace(
            one,
            own=attempts[index],
            siblings=tuple(attempts[other] for other in members[groups[index]] if other != index),
        )
        for index, one in enumerate(found)
    ]


def can_tell(context: Context, rows: Sequence[Row]) -> bool:
    """Whether a context could tell something in any row, tried on a right and a wrong rollout."""
    text = "\n\n".join(["a step"] * REHEARSED) + "\n\n\\boxed{?}"
    right, wrong = Attempt(text, 1.0), Attempt(text, 0.0)
    return any(
        _told(context, row, replace(known, own=own, siblings=(right, wrong))) is not None
        for row, known in zip(rows, all_known(rows), strict=True)
        for own in (right, wrong)
    )


def collate_role(
    role: str, ids: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]], pad_id: int
) -> dict[str, torch.Tensor]:
    """`{role}_input_ids` and `{role}_attention_mask`, [B, P + C] int64, laid out as `collate` does."""
    prompt, prompt_mask = pad_left(ids, pad_id)
    completion, completion_mask = pad_right(completions, pad_id)
    return {
        f"{role}_input_ids": torch.cat([prompt, completion], dim=1),
        f"{role}_attention_mask": torch.cat([prompt_mask, completion_mask], dim=1),
    }


def _read(context: Context, rows: Sequence[Row], known: Sequence[Known], encoder: Encoder) -> Reading:
    texts = [_told(context, row, one) for row, one in zip(rows, known, strict=True)]
    # Who is told nothing more reads what the student reads, with the student's switches of the chat template.
    plain = encoder.student_ids(rows)
    chats = {
        index: teacher_messages(rows[index].student, text)
        for index, text in enumerate(texts)
        if text is not None and context.name != "plain"
    }
    encoded = dict(zip(chats, _encoded(context, chats, rows, encoder), strict=True))
    ids = [encoded.get(index, one) for index, one in enumerate(plain)]
    budget = encoder.max_teacher_prompt_length
    long = [text is not None and len(found) > budget for text, found in zip(texts, ids, strict=True)]
    if any(long) and not context.on_policy:
        index = long.index(True)
        raise ValueError(
            f"{rows[index].where}: expected a context {context.name!r} of at most {budget} tokens "
            f"(max_teacher_prompt_length), got {len(ids[index])}; nothing is truncated"
        )
    return Reading(
        tuple(plain[i] if long[i] else ids[i] for i in range(len(rows))),
        tuple(text is not None and not long[i] for i, text in enumerate(texts)),
        sum(long),
    )


def _encoded(
    context: Context, chats: Mapping[int, Sequence[Message]], rows: Sequence[Row], encoder: Encoder
) -> list[tuple[int, ...]]:
    """The ids of the rows that are told something; ValueError naming the first that cannot be encoded."""
    origin = OWN_TEMPLATES.get(context.name, "") + f"context_templates ({context.name!r})"
    try:
        return encoder.teacher_ids(list(chats.values()), origin, [rows[index].tools for index in chats])
    except ValueError:
        for index, chat in chats.items():
            try:
                encoder.teacher_ids([chat], origin, [rows[index].tools])
            except ValueError as error:
                raise ValueError(f"{rows[index].where}: {error}") from error
        raise


def _told(context: Context, row: Row, known: Known) -> str | None:
    try:
        return context(known)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None

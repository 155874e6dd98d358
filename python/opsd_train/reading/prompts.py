"""From a row's messages to token ids: templates, the chat template, budgets, left padding."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from opsd_train.data.quarantine import Refuse, stop
from opsd_train.reading import thinking
from opsd_train.reading.bounds import fewest_tokens
from opsd_train.reading.templating import Message, Tools, written

if TYPE_CHECKING:
    from opsd_train.config import OPSDConfig
    from opsd_train.data.rows import Row

STUDENT_TEMPLATE = "{problem}\n\nReason step by step, then state the final answer."
TEACHER_TEMPLATE = (
    "{problem}\n\n"
    "A reference solution to this problem follows.\n\n{solution}\n\n"
    "Read it until you understand why every step holds. Then put it aside and solve the problem yourself, in "
    "your own words. Reason step by step, then state the final answer."
)
CONTEXT_TEMPLATE = (
    "{prompt}\n\n"
    "What follows is known to you alone.\n\n{privileged_context}\n\n"
    "Take it into account, but answer in your own words and without mentioning it."
)


@dataclass(frozen=True)
class Templates:
    """What the student and the teacher read; `{name}` stands for a column, any other brace for itself.

    Args:
        student: user message of the student for a row with `problem` and `solution`.
        teacher: user message of the teacher for the same row.
        context: user message of the teacher for a row with `prompt` and `privileged_context`.
    """

    student: str = STUDENT_TEMPLATE
    teacher: str = TEACHER_TEMPLATE
    context: str = CONTEXT_TEMPLATE

    def __post_init__(self) -> None:
        _require("student_template", self.student, present=("problem",), absent=("solution",))
        _require("teacher_template", self.teacher, present=("problem", "solution"))
        _require("context_template", self.context, present=("prompt", "privileged_context"))


@dataclass(frozen=True)
class Prompt:
    """One row as the model reads it: the ids of the student's and the teacher's prompt, and the row."""

    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    answer: str | None
    where: str
    row: "Row | None" = field(default=None, repr=False)


@dataclass(frozen=True)
class Encoder:
    """Tokenises rows and holds them to their budgets.

    Args:
        tokenizer: its chat template is used when it has one.
        max_prompt_length: most tokens in a student's prompt, chat template included.
        max_teacher_prompt_length: the same for the teacher.
        student_chat_kwargs: what the student's chat template is given besides (`{"enable_thinking": False}`).
        teacher_chat_kwargs: the same for the teacher's.
        max_completion_length: tokens that follow a prompt.
        positions: of the model, for the longer prompt and a completion; None is no bound.
        embeddings: of the model; a token of another id is an error, None is no bound.
    """

    tokenizer: PreTrainedTokenizerBase
    max_prompt_length: int
    max_teacher_prompt_length: int
    student_chat_kwargs: Mapping[str, Any] = field(default_factory=dict)
    teacher_chat_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_completion_length: int = 0
    positions: int | None = None
    embeddings: int | None = None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        config: "OPSDConfig",
        positions: int | None = None,
        embeddings: int | None = None,
    ) -> "Encoder":
        """With the budgets and switches of a run, for a model with so many positions and embeddings."""
        own = cls(
            tokenizer,
            config.max_prompt_length,
            config.max_teacher_prompt_length,
            config.student_chat_kwargs,  # type: ignore[arg-type]
            config.teacher_chat_kwargs,  # type: ignore[arg-type]
            config.max_completion_length,
            positions,
            embeddings,
        )
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        own.check_ids("processing_class", [] if padding is None else [padding])
        return own

    def ignored_switches(self) -> list[str]:
        """A sentence for each switch (`enable_thinking`) that is set and that the chat template lacks."""
        student, teacher = self.student_chat_kwargs, self.teacher_chat_kwargs
        return thinking.ignored(self.tokenizer, student=student, teacher=teacher)

    def encode(self, rows: "Sequence[Row]", refuse: Refuse = stop) -> list[Prompt]:
        """Tokenise every row; one that does not fit is refused by its place, nothing is truncated."""
        prompts = []
        rows = [row for row in rows if not self._refused(row, refuse)]
        for row, encoded in zip(rows, self._encoded_rows(rows), strict=True):
            try:
                student, teacher = encoded or self._encoded_row(row)
                self.check_budget(row, len(student), len(teacher))
            except ValueError as error:
                refuse(str(error), row.where, row.record)
            else:
                prompts.append(Prompt(tuple(student), tuple(teacher), row.answer, row.where, row))
        return prompts

    def _encoded_rows(self, rows: "Sequence[Row]") -> Sequence[tuple[list[int], list[int]] | None]:
        """The ids of student and teacher in one go; None for every row if one of them cannot be encoded."""
        try:
            tools = [row.tools for row in rows]
            student = self._ids([row.student for row in rows], self.student_chat_kwargs, tools=tools)
            teacher = self._ids([row.teacher for row in rows], self.teacher_chat_kwargs, tools=tools)
        except ValueError:
            return [None] * len(rows)
        return list(zip(student, teacher, strict=True))

    def _encoded_row(self, row: "Row") -> tuple[list[int], list[int]]:
        ours, theirs = _origins(row)
        try:
            (student,) = self._ids([row.student], self.student_chat_kwargs, ours, [row.tools])
            (teacher,) = self._ids([row.teacher], self.teacher_chat_kwargs, theirs, [row.tools])
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
        return student, teacher

    def student_ids(self, rows: "Sequence[Row]") -> list[tuple[int, ...]]:
        """What the student reads, as ids; they are not held to a budget here."""
        chats, tools = [row.student for row in rows], [row.tools for row in rows]
        return [tuple(ids) for ids in self._ids(chats, self.student_chat_kwargs, tools=tools)]

    def teacher_ids(
        self,
        chats: "Sequence[Sequence[Message]]",
        origin: str = "prompt",
        tools: "Sequence[Tools] | None" = None,
    ) -> list[tuple[int, ...]]:
        """What a teacher reads, as ids, without a budget; errors name the option the texts came from."""
        return [tuple(ids) for ids in self._ids(chats, self.teacher_chat_kwargs, origin, tools)]

    def _ids(
        self,
        chats: "Sequence[Sequence[Message]]",
        chat_kwargs: Mapping[str, Any],
        origin: str = "prompt",
        tools: "Sequence[Tools] | None" = None,
    ) -> list[list[int]]:
        if not chats:
            return []
        texts = written(self.tokenizer, chats, chat_kwargs, tools or [()] * len(chats))
        if self.tokenizer.chat_template is not None:
            # The chat template has already written the special tokens.
            return self._encoded(texts, origin, add_special_tokens=False)
        return self._encoded(texts, origin)

    def _refused(self, row: "Row", refuse: Refuse) -> bool:
        """Whether a row is refused for texts that are over their budgets however they are tokenised."""
        for reader, chat, given, budget, option in (
            ("student", row.student, self.student_chat_kwargs, self.max_prompt_length, "max_prompt_length"),
            (
                "teacher",
                row.teacher,
                self.teacher_chat_kwargs,
                self.max_teacher_prompt_length,
                "max_teacher_prompt_length",
            ),
        ):
            if sum(len(message["content"]) for message in chat) <= budget:
                continue
            try:
                (text,) = written(self.tokenizer, [chat], given, [row.tools])
            except ValueError:
                return False  # it is refused where it is encoded
            if (least := fewest_tokens(self.tokenizer, text)) > budget:
                reason = (
                    f"{row.where}: a prompt is longer than its budget: the {reader}'s has at least {least} "
                    f"tokens ({option} {budget}); nothing is truncated"
                )
                refuse(reason, row.where, row.record)
                return True
        return False

    def _encoded(self, texts: list[str], origin: str, **how: bool) -> list[list[int]]:
        try:
            # Of lengths the budget tells.
            found = self.tokenizer(texts, return_special_tokens_mask=True, verbose=False, **how)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(
                f"{origin}: expected text that the tokenizer can encode, got {texts[0][:60]!r}; {error} "
                "(does a small vocabulary lack words of the template, or of the row?)"
            ) from error
        pairs = zip(found["input_ids"], found["special_tokens_mask"], strict=True)
        open_ended = [self._open(*pair) for pair in pairs]
        for ids in open_ended:
            self.check_ids(origin, ids)
        return open_ended

    def check_ids(self, origin: str, ids: Sequence[int]) -> None:
        """ValueError for a token that the model has no embedding of."""
        highest = max(ids, default=-1)
        if self.embeddings is not None and highest >= self.embeddings:
            raise ValueError(
                f"{origin}: expected tokens that the model has embeddings of, {self.embeddings} rows; the "
                f"tokenizer {self.tokenizer.name_or_path} has id {highest} for "
                f"{self.tokenizer.convert_ids_to_tokens(highest)!r}, added after the model was made"
            )

    def _open(self, ids: list[int], added: list[int]) -> list[int]:
        """The ids without those that the tokenizer puts behind every text: a completion is to follow."""
        end = len(ids)
        while end and added[end - 1] and 0 in added:
            end -= 1
        if end < len(ids):
            names = ", ".join(map(str, self.tokenizer.convert_ids_to_tokens(ids[end:])))
            warnings.warn(
                f"the tokenizer ends every text in {names}: prompts are read without it, since a "
                "completion is to follow",
                stacklevel=2,
            )
        return ids[:end]

    def check_budget(self, row: "Row", student: int, teacher: int) -> None:
        """ValueError for a row whose prompts have no tokens, or too many for budgets or positions."""
        if student == 0 or teacher == 0:
            raise ValueError(f"{row.where}: expected prompts of at least one token, got an empty one")
        if student > self.max_prompt_length or teacher > self.max_teacher_prompt_length:
            raise ValueError(
                f"{row.where}: a prompt is longer than its budget: the student's has {student} tokens "
                f"(max_prompt_length {self.max_prompt_length}), the teacher's {teacher} "
                f"(max_teacher_prompt_length {self.max_teacher_prompt_length}); nothing is truncated"
            )
        longest = max(student, teacher)
        if self.positions is not None and longest + self.max_completion_length > self.positions:
            raise ValueError(
                f"{row.where}: its longer prompt has {longest} tokens, which with a completion of "
                f"{self.max_completion_length} (max_completion_length) is more than the model's "
                f"{self.positions} positions (max_position_embeddings)"
            )


def _origins(row: "Row") -> tuple[str, str]:
    """The options or columns that the texts of a row come from: the student's, the teacher's."""
    columns = row.columns
    if "teacher_prompt" in columns:
        return "prompt", "teacher_prompt"
    if "privileged_context" in columns:
        return "prompt", "context_template"
    ours = "student_template" if "problem" in columns else "prompt"
    return ours, ours if row.student == row.teacher else "teacher_template"


def fill(template: str, **values: str) -> str:
    """Replace each `{name}` of `values` once; what a value contains is never looked at again."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda match: values[match[1]], template)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """The text of one sequence."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[B, L]` int64 padded on the left to the longest sequence, and their mask `[B, L]` int64."""
    longest = max(map(len, sequences))
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in sequences]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in sequences]
    return torch.tensor(ids), torch.tensor(mask)


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `pad_left`, with the padding behind."""
    longest = max(map(len, sequences))
    ids = [list(row) + [pad_id] * (longest - len(row)) for row in sequences]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in sequences]
    return torch.tensor(ids), torch.tensor(mask)


def _require(name: str, template: str, present: tuple[str, ...], absent: tuple[str, ...] = ()) -> None:
    for column in present:
        if f"{{{column}}}" not in template:
            raise ValueError(f"{name}: expected a template with {{{column}}}, got {template!r}")
    for column in absent:
        if f"{{{column}}}" in template:
            raise ValueError(f"{name}: the student must not see {{{column}}}, got {template!r}")

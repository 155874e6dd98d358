"""What a run would make of its data: rows and columns, prompts against budgets, the tokens that meet."""

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from opsd_kernels import Objective, methods
from opsd_train.config import OPSDConfig
from opsd_train.data.quarantine import Refuse
from opsd_train.data.rows import Row, load_rows
from opsd_train.loading import Reader
from opsd_train.reading import thinking
from opsd_train.reading.prompts import Encoder, Prompt
from opsd_train.run_options import RunOptions

SINGULAR = {"have": "has", "come": "comes"}
QUANTILES = {"50 %": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1.0}


@dataclass
class Findings:
    """What was found.

    Args:
        rows: that can be read.
        columns: how many of them have each column.
        conventions: how many of them follow each convention.
        refused: what would stop a run, by place and row.
        warnings: what would not, but is seldom meant.
        total: rows that there are, refused ones too.
        lengths: tokens of each row by `student`, `teacher` and `solution`; without a model there are none.
        prompts: the rows as a model reads them.
    """

    rows: list[Row]
    columns: Counter[str]
    conventions: Counter[str]
    refused: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    total: int = 0
    lengths: dict[str, list[int]] = field(default_factory=dict)
    prompts: list[Prompt] = field(default_factory=list)


def check(options: RunOptions, config: OPSDConfig, reader: Reader | None) -> Findings:
    """Read all rows of `data` and encode them; nothing is trained. ValueError if there are none."""
    refused: list[str] = []

    def note(reason: str, where: str, raw: Any) -> None:
        refused.append(reason)

    templates, reading = config.to_templates(), options.reading(note)
    try:
        rows = load_rows(options.data, templates, config.method is None, reading)
    except ValueError:
        if not refused:
            raise
        return Findings([], Counter(), Counter(), refused, total=len(refused))
    found = Findings(
        rows,
        Counter(name for row in rows for name in row.columns),
        Counter(_convention(row.columns) for row in rows),
        refused,
        _of_clips(config) + _of_texts(rows, privileged=config.method is None),
        len(rows) + len(refused),
    )
    if reader is not None:
        _encode(found, Encoder.of(reader.tokenizer, config, reader.positions, reader.embeddings), note)
    return found


def _convention(columns: Mapping[str, Any]) -> str:
    if "teacher_prompt" in columns:
        return "prompt and teacher_prompt"
    if "privileged_context" in columns:
        return "prompt and privileged_context"
    if "problem" in columns and "solution" in columns:
        return "problem and solution"
    return "problem alone" if "problem" in columns else "prompt alone"


def _of_texts(rows: Sequence[Row], privileged: bool) -> list[str]:
    """What the texts alone tell."""
    seen: Counter[tuple[str, str]] = Counter()
    repeated: list[Row] = []
    without: list[Row] = []
    same: list[Row] = []
    told: list[Row] = []
    for row in rows:
        student, teacher = (_text(messages) for messages in (row.student, row.teacher))
        seen[student, teacher] += 1
        solution = row.columns.get("solution")
        for case, rows_of in (
            (seen[student, teacher] > 1, repeated),
            (privileged and row.problem.strip() not in teacher, without),
            (privileged and student == teacher, same),
            (isinstance(solution, str) and len(solution) > 20 and solution.strip() in student, told),
        ):
            if case:
                rows_of.append(row)
    return [
        *_sentence(repeated, "come again (--repeated-rows refuse makes them bad rows)"),
        *_sentence(without, "have a teacher's prompt in which the student's problem does not occur"),
        *_sentence(same, "have a teacher that reads no more than the student"),
        *_sentence(told, "have the solution in the student's prompt"),
    ]


def _encode(found: Findings, encoder: Encoder, note: Refuse) -> None:
    """Add lengths, prompts, and what they tell."""
    no_bound = sys.maxsize
    wide = replace(encoder, max_prompt_length=no_bound, max_teacher_prompt_length=no_bound, positions=None)
    prompts = wide.encode(found.rows, note)
    for prompt in prompts:
        try:
            encoder.check_budget(prompt.row, len(prompt.student_ids), len(prompt.teacher_ids))  # type: ignore[arg-type]
        except ValueError as error:
            found.refused.append(str(error))
        else:
            found.prompts.append(prompt)
    solutions = [text for row in found.rows if isinstance(text := row.columns.get("solution"), str)]
    found.lengths = {
        "student": [len(prompt.student_ids) for prompt in prompts],
        "teacher": [len(prompt.teacher_ids) for prompt in prompts],
        "solution": [len(ids) for ids in _tokens(encoder.tokenizer, solutions)],
    }
    found.warnings += _of_template(encoder)
    found.warnings += _of_tokens(found.prompts, encoder)


def _of_clips(config: OPSDConfig) -> list[str]:
    """What a clip of the loss means for its numbers."""
    if config.method is None:
        losses: list[Any] = [config.to_objective()]
    else:
        losses = [term.loss for term in methods.recipe(config.method, **(config.method_options or {})).terms]  # type: ignore[arg-type]
    bounds = [one for one in losses if isinstance(one, Objective) and one.entry_clip and not one.ratio_bound]
    return [
        f"entry_clip {one.entry_clip:g} ({one.clip_mode}) can push down what the teacher raises: the loss "
        "can fall while the forward KL and the student's entropy rise, so go by these two, not by the loss "
        "(clip_mode ratio cannot do that)"
        for one in bounds[:1]
    ]


def _of_template(encoder: Encoder) -> list[str]:
    """What the chat template tells."""
    tokenizer = encoder.tokenizer
    given = {"student": encoder.student_chat_kwargs, "teacher": encoder.teacher_chat_kwargs}
    if tokenizer.chat_template is None:
        return [
            "the tokenizer has no chat template: prompts are plain text",
            *encoder.ignored_switches(),
        ]
    if not thinking.has_header(tokenizer):
        return ["the chat template ignores add_generation_prompt: no prompt ends in an assistant's header"]
    headers = {reader: thinking.header(tokenizer, **kwargs) for reader, kwargs in given.items()}
    warnings = encoder.ignored_switches()
    if headers["student"] != headers["teacher"]:
        warnings.append(
            f"the student's prompts end in {headers['student']!r}, the teacher's in {headers['teacher']!r}: "
            "a completion begins in another place of the template (student_thinking, teacher_thinking)"
        )
    return warnings


def _of_tokens(prompts: Sequence[Prompt], encoder: Encoder) -> list[str]:
    """What the token ids tell."""
    tokenizer = encoder.tokenizer
    given = (encoder.student_chat_kwargs, encoder.teacher_chat_kwargs)
    headers = [thinking.header(tokenizer, **kwargs) for kwargs in given]
    length = max(1, min(len(ids) for ids in _tokens(tokenizer, headers)))
    special = [token for token in tokenizer.all_special_tokens if token]
    apart = [one for one in prompts if one.student_ids[-length:] != one.teacher_ids[-length:]]
    marked = [
        one
        for one in prompts
        if one.row is not None
        and any(token in _text((*one.row.student, *one.row.teacher)) for token in special)
    ]
    return [
        *_sentence(apart, f"have prompts whose last {length} tokens differ between student and teacher"),
        *_sentence(marked, "have a special token of the tokenizer in the text"),
    ]


def quantile(lengths: Sequence[int], share: float) -> int:
    """The least length that at least this share of the lengths does not exceed."""
    ordered = sorted(lengths)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _text(messages: Sequence[Mapping[str, str]]) -> str:
    return "\n".join(message["content"] for message in messages)


def count_of(rows: int) -> str:
    """`1 row`, `2 rows`."""
    return f"{rows:,} row" + ("" if rows == 1 else "s")


def _sentence(rows: Sequence[Any], what: str) -> list[str]:
    """What is to be said of rows, beginning with a verb in the plural; nothing of none."""
    if not rows:
        return []
    verb, _, rest = what.partition(" ")
    verb = SINGULAR[verb] if len(rows) == 1 else verb
    return [f"{count_of(len(rows))} {verb} {rest}; the first is {rows[0].where}"]

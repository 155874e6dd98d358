"""Rows of a data set: JSONL, Parquet or dictionaries, in any of three conventions of columns."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from opsd_train.prompts import Message, Templates, fill

CONVENTIONS = "problem and solution, prompt and privileged_context, or prompt and teacher_prompt"


@dataclass(frozen=True)
class Row:
    """What the student reads, what the teacher reads, which answer is right, and where the row is from.

    `problem` is the problem's text without a template, and `columns` the record as it was given, for contexts
    of a teacher and verifiers that read other columns.
    """

    student: tuple[Message, ...]
    teacher: tuple[Message, ...]
    answer: str | None
    where: str
    problem: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


def load_rows(
    source: str | Path | Iterable[Mapping[str, Any]], templates: Templates, privileged: bool = True
) -> list[Row]:
    """Read a `.jsonl` or `.parquet` file, or dictionaries, into rows.

    | columns | student reads | teacher reads |
    |---|---|---|
    | `problem`, `solution` | the student template | the teacher template |
    | `prompt`, `privileged_context` | the prompt | the prompt, last message through the context template |
    | `prompt`, `teacher_prompt` | the prompt | the teacher prompt |

    A prompt is a string or a list of chat messages. An optional column `answer` holds what an evaluation
    compares completions with; without it that is the `solution`, where there is one. With `privileged=False`,
    `problem` or `prompt` alone will do, and the teacher of such a row reads what the student reads: for
    methods whose contexts are made from other columns or from rollouts. Raises ValueError naming file and
    line for a row that is none of these, or has a column missing or empty.
    """
    rows = [to_row(record, templates, where, privileged) for record, where in _records(source)]
    if not rows:
        raise ValueError(f"data: expected at least one row in {_name(source)}, got none")
    return rows


def to_row(record: Mapping[str, Any], templates: Templates, where: str, privileged: bool = True) -> Row:
    """Map one record by the columns it has; see `load_rows`."""
    answer = record.get("answer")
    problem = None
    if "teacher_prompt" in record:
        student = _messages(record, "prompt", where)
        teacher = _messages(record, "teacher_prompt", where)
    elif "privileged_context" in record:
        student = _messages(record, "prompt", where)
        context = _text(record, "privileged_context", where)
        last = student[-1]
        known = fill(templates.context, prompt=last["content"], privileged_context=context)
        teacher = (*student[:-1], {**last, "content": known})
    elif not privileged and "prompt" in record:
        student = teacher = _messages(record, "prompt", where)
    elif not privileged and "problem" in record and record.get("solution") is None:
        problem = _text(record, "problem", where)
        student = teacher = _user(fill(templates.student, problem=problem))
    elif "problem" in record:
        problem, solution = _text(record, "problem", where), _text(record, "solution", where)
        student = _user(fill(templates.student, problem=problem))
        teacher = _user(fill(templates.teacher, problem=problem, solution=solution))
        answer = solution if answer is None else answer
    else:
        raise ValueError(f"{where}: expected columns {CONVENTIONS}; got {', '.join(record) or 'none'}")
    columns = {name: value for name, value in record.items() if value is not None}
    if "answer" in columns:
        columns["answer"] = str(answer)
    told = student[-1]["content"] if problem is None else problem
    return Row(student, teacher, None if answer is None else str(answer), where, told, columns)


def _records(source: str | Path | Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], str]]:
    if not isinstance(source, str | Path):
        for number, record in enumerate(source, start=1):
            yield record, f"row {number}"
        return
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"data: expected a file, got {path}, which does not exist")
    if path.suffix == ".jsonl":
        yield from _jsonl(path)
    elif path.suffix == ".parquet":
        table = datasets.load_dataset("parquet", data_files=str(path), split="train", trust_remote_code=False)
        for number, record in enumerate(table, start=1):
            yield record, f"{path} row {number}"
    else:
        raise ValueError(f"data: expected a file that ends in .jsonl or .parquet, got {path}")


def _jsonl(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: expected a JSON object, got {line.strip()[:60]!r}: {error}"
                ) from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected a JSON object, got a {type(record).__name__}")
            yield record, where


def _text(record: Mapping[str, Any], column: str, where: str) -> str:
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        got = "no such column" if column not in record else repr(value)
        raise ValueError(f"{where}: expected text in column {column!r}, got {got}")
    return value


def _messages(record: Mapping[str, Any], column: str, where: str) -> tuple[Message, ...]:
    value = record.get(column)
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        if not all(isinstance(m, Mapping) and _is_message(m) for m in value):
            raise ValueError(
                f"{where}: expected messages with a role and a content in column {column!r}, got {value!r}"
            )
        if value[-1]["role"] == "assistant":
            raise ValueError(f"{where}: expected column {column!r} to end before the assistant's turn")
        return tuple({"role": m["role"], "content": m["content"]} for m in value)
    return _user(_text(record, column, where))


def _is_message(message: Mapping[str, Any]) -> bool:
    return all(isinstance(message.get(key), str) and message[key].strip() for key in ("role", "content"))


def _user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _name(source: str | Path | Iterable[Mapping[str, Any]]) -> str:
    return str(source) if isinstance(source, str | Path) else "the list of rows"

"""Rows of a data set, wherever it is, in any of three conventions of columns."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd_train.data import generated, sources
from opsd_train.data.messages import check_encodable, is_nan, read_messages, read_tools
from opsd_train.data.quarantine import Quarantine, Refuse, stop
from opsd_train.reading.prompts import Message, Templates, fill

if TYPE_CHECKING:
    from opsd_train.config import OPSDConfig
    from opsd_train.run_options import RunOptions

CONVENTIONS = "problem and solution, prompt and privileged_context, or prompt and teacher_prompt"


@dataclass(frozen=True)
class Row:
    """What the student reads, what the teacher reads, which answer is right, and where the row is from.

    `problem` is the problem's text without a template, `columns` the record's columns that hold something,
    for contexts of a teacher and verifiers that read other columns, `record` the record as it was given, and
    `tools` what the chat template is told of tools.
    """

    student: tuple[Message, ...]
    teacher: tuple[Message, ...]
    answer: str | None
    where: str
    problem: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    record: Any = field(default=None, repr=False, compare=False)
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Reading:
    """How a data set is read.

    Args:
        choice: which part of it.
        columns: the name a column has in the data set, by the name it has here.
        refuse: what happens to a bad row; it stops the run, if nothing else is said.
        repeats: whether a row that comes again is kept; if not, it is a bad row.
    """

    choice: sources.Choice = field(default_factory=sources.Choice)
    columns: Mapping[str, str] = field(default_factory=dict)
    refuse: Refuse = stop
    repeats: bool = True


@dataclass(frozen=True)
class Loaded:
    """The rows of a run and those it is evaluated on, what was set aside, and what a person should know."""

    rows: list[Row]
    held_out: list[Row]
    quarantine: Quarantine
    notes: tuple[str, ...] = ()


def load(options: "RunOptions", config: "OPSDConfig") -> Loaded:
    """Read what `data` and `eval_data` name; see `load_rows`.

    Of generated problems, those that come twice and those of the held-out set are left out of the training
    rows; in other data they are counted. Raises ValueError for what cannot be read, and for two sets of
    generated problems whose seeds overlap.
    """
    resumes, writes = config.resume_from_checkpoint is not None, config.process_index == 0
    quarantine = Quarantine(config.output_dir, options.skip_bad_rows, resumes, writes)
    templates, privileged = config.to_templates(), config.method is None
    reading = options.reading(quarantine)
    _check_apart(options)
    rows = load_rows(options.data, templates, privileged, reading)
    held_out: list[Row] = []
    if options.eval_data:
        reading = options.reading(quarantine, held_out=True)
        held_out = load_rows(options.eval_data, templates, privileged, reading)
    notes: list[str] = []
    if is_generated(options.eval_data):
        held_out, gone = _without(held_out, frozenset())
        notes += [f"eval_data: {gone} problems that came twice are left out"] if gone else []
    known = frozenset(row.problem for row in held_out)
    if is_generated(options.data):
        rows, gone = _without(rows, known)
        notes += [f"data: {gone} problems that came twice or are held out are left out"] if gone else []
    elif shared := sum(row.problem in known for row in rows):
        notes.append(f"data: {shared} of {len(rows)} training rows have a held-out problem")
    if not rows:
        raise ValueError(f"data: expected problems in {options.data} that are not held out, got none")
    return Loaded(rows, held_out, quarantine, tuple(notes))


def load_rows(
    source: str | Path | Iterable[Mapping[str, Any]],
    templates: Templates,
    privileged: bool = True,
    reading: Reading = Reading(),
) -> list[Row]:
    """Read a data set (see `sources.records`) or dictionaries into rows.

    | columns | student reads | teacher reads |
    |---|---|---|
    | `problem`, `solution` | the student template | the teacher template |
    | `prompt`, `privileged_context` | the prompt | the prompt, last message through the context template |
    | `prompt`, `teacher_prompt` | the prompt | the teacher prompt |

    A prompt is a string or a list of chat messages, which may have `tool_calls` and the like, and a column
    `tools` says which tools there are: the chat template is given all of it. An optional column `answer`
    holds what an evaluation compares completions with; without it that is the `solution`, where there is one.
    With `privileged=False`, `problem` or `prompt` alone will do, and the teacher of such a row reads what the
    student reads: for methods whose contexts are made from other columns or from rollouts. A number that is
    none (NaN) is a null. A row that is none of these, or has a column
    missing or empty, is a bad one; the ValueError for it names file and line.
    """
    rows: list[Row] = []
    first: dict[Any, str] = {}
    for found in sources.records(source, reading.choice):
        try:
            if found.error is not None:
                raise ValueError(found.error)
            record = _renamed(found.record, reading.columns, found.where)
            row = replace(to_row(record, templates, found.where, privileged), record=found.raw)
            if not reading.repeats:
                _check_new(row, first)
        except ValueError as error:
            reading.refuse(str(error), found.where, found.raw)
        else:
            rows.append(row)
    if not rows:
        raise ValueError(f"data: expected at least one row in {_name(source)}, got none")
    return rows


def to_row(record: Mapping[str, Any], templates: Templates, where: str, privileged: bool = True) -> Row:
    """Map one record by the columns it has; see `load_rows`."""
    answer = _answer(record, where)
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
        raise ValueError(
            f"{where}: expected columns {CONVENTIONS}; got {', '.join(record) or 'none'}{_hint(record)}"
        )
    columns = {name: value for name, value in record.items() if value is not None}
    if "answer" in columns:
        columns["answer"] = str(answer)
    told = student[-1]["content"] if problem is None else problem
    tools = read_tools(record, where)
    return Row(student, teacher, None if answer is None else str(answer), where, told, columns, tools=tools)


def _hint(record: Mapping[str, Any]) -> str:
    """How two columns of other names are told, if there are that many."""
    if len(record) < 2:
        return ""
    problem, solution = list(record)[:2]
    told = json.dumps({"problem": problem, "solution": solution}, ensure_ascii=False)
    return f"; --columns '{told}' says what they are called"


def is_generated(source: Any) -> bool:
    """Whether the name of a data set asks for generated problems."""
    return isinstance(source, str) and source.startswith(generated.PREFIX)


def _check_apart(options: "RunOptions") -> None:
    """ValueError if both sets are generated and share a seed: they would share problems."""
    if not is_generated(options.data) or not is_generated(options.eval_data):
        return
    ours = sources.problems(options.data, options.choice())
    theirs = sources.problems(str(options.eval_data), options.choice(held_out=True))
    if ours.overlaps(theirs):
        raise ValueError(
            f"eval_data: expected other problems than the training ones, which have the seeds {ours.seed} to "
            f"{ours.seed + ours.size - 1}; got {theirs.seed} to {theirs.seed + theirs.size - 1}"
        )


def _without(rows: Sequence[Row], known: frozenset[str]) -> tuple[list[Row], int]:
    """The rows whose problem comes for the first time and is none of the known; and how many are not."""
    kept = {row.problem: row for row in reversed(rows) if row.problem not in known}
    ordered = [row for row in rows if kept.get(row.problem) is row]
    return ordered, len(rows) - len(ordered)


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Mapping[str, Any]:
    """The record with columns under our names; theirs are gone unless they are asked for too."""
    for ours, theirs in columns.items():
        if theirs not in record:
            held = ", ".join(record) or "none"
            raise ValueError(f"{where}: expected a column {theirs!r} to read {ours!r} from, got {held}")
    rest = {name: value for name, value in record.items() if name not in columns.values()}
    named = rest | {ours: record[theirs] for ours, theirs in columns.items()}
    return {name: None if is_nan(value) else value for name, value in named.items()}


def _check_new(row: Row, first: dict[Any, str]) -> None:
    key = (_as_key(row.student), _as_key(row.teacher), row.answer, json.dumps(row.tools, default=str))
    if key in first:
        raise ValueError(f"{row.where}: expected each row once, got that of {first[key]} again")
    first[key] = row.where


def _as_key(messages: Sequence[Message]) -> str:
    return json.dumps(messages, sort_keys=True, default=str)


def _answer(record: Mapping[str, Any], where: str) -> Any:
    answer = record.get("answer")
    if answer is not None and not isinstance(answer, str | int | float):
        raise ValueError(f"{where}: expected a text or a number in column 'answer', got {answer!r}")
    if isinstance(answer, str):
        check_encodable(answer, "answer", where)
    elif isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"{where}: expected a finite number in column 'answer', got {answer!r}")
    return answer


def _text(record: Mapping[str, Any], column: str, where: str) -> str:
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        got = "no such column" if column not in record else repr(value)
        raise ValueError(f"{where}: expected text in column {column!r}, got {got}")
    check_encodable(value, column, where)
    return value


def _messages(record: Mapping[str, Any], column: str, where: str) -> tuple[Message, ...]:
    value = record.get(column)
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return read_messages(value, column, where)
    return _user(_text(record, column, where))


def _user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _name(source: str | Path | Iterable[Mapping[str, Any]]) -> str:
    return str(source) if isinstance(source, str | Path) else "the list of rows"

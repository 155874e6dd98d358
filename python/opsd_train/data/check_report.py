"""What `opsd check` shows, in tables that a terminal of 80 columns has room for."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from opsd_train.config import OPSDConfig
from opsd_train.data.check import QUANTILES, Findings, count_of, quantile
from opsd_train.data.rows import Row
from opsd_train.loading import Reader
from opsd_train.reading.prompts import Prompt, decode

PROMPT_TOKENS, COMPLETION_TOKENS = 10, 6


def tables(
    found: Findings, config: OPSDConfig, reader: Reader | None, rows: int, refused: int
) -> Iterator[RenderableType]:
    """Everything found, `rows` rows token by token, and the first of what would be refused.

    Without a reader, the rows are shown as texts.
    """
    if found.rows:
        yield _overview(found)
    if any(found.lengths.values()):
        yield _lengths(found, config, reader)
    if reader is None:
        for row in found.rows[:rows]:
            yield _texts(row)
    else:
        for prompt in found.prompts[:rows]:
            yield _tokens(prompt, reader.tokenizer)
    for warning in found.warnings:
        yield f"[yellow]warning:[/yellow] {escape(warning)}"
    for reason in found.refused[:refused]:
        yield f"[red]refused:[/red] {escape(reason)}"
    if found.refused:
        yield f"[red]{len(found.refused):,} of {count_of(found.total)} would be refused[/red]"
    else:
        every = "" if found.total == 1 else "all "
        yield f"[green]{every}{count_of(found.total)} would be trained on[/green]"


def _overview(found: Findings) -> Table:
    table = Table(title=count_of(len(found.rows)), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("columns", overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    for name, count in found.conventions.most_common():
        table.add_row(f"[bold]{escape(name)}[/bold]", f"{count:,}")
    for name, count in found.columns.most_common():
        table.add_row(escape(name), f"{count:,}")
    return table


def _lengths(found: Findings, config: OPSDConfig, reader: Reader | None) -> Table:
    budgets = {
        "student": ("student's prompt", "max_prompt_length", config.max_prompt_length),
        "teacher": ("teacher's prompt", "max_teacher_prompt_length", config.max_teacher_prompt_length),
        "solution": ("solution", "max_completion_length", config.max_completion_length),
    }
    close = (0, 1, 0, 0)  # columns at this distance leave room for numbers of six digits
    table = Table(title="lengths", title_justify="left", box=box.SIMPLE_HEAD, padding=close)
    table.add_column("tokens of", overflow="fold")
    for name in (*QUANTILES, "budget", "over it"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = [(*budgets[name], lengths) for name, lengths in found.lengths.items() if lengths]
    if reader is not None and reader.positions is not None and found.lengths["student"]:
        prompts = zip(found.lengths["student"], found.lengths["teacher"], strict=True)
        whole = [max(pair) + config.max_completion_length for pair in prompts]
        shown.append(("prompt and completion", "the model's positions", reader.positions, whole))
    for label, option, budget, lengths in shown:
        numbers = [f"{quantile(lengths, share):,}" for share in QUANTILES.values()]
        over = sum(length > budget for length in lengths)
        table.add_row(f"{label}\n[dim]{option}[/dim]", *numbers, f"{budget:,}", f"{over:,}")
    return table


def _texts(row: Row) -> Table:
    """The messages of student and teacher, before a chat template."""
    table = Table(title=f"{escape(row.where)}, texts", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("reader")
    table.add_column("role")
    table.add_column("message", overflow="fold")
    for reader, messages in (("student", row.student), ("teacher", row.teacher)):
        for number, message in enumerate(messages, start=1):
            cells = (escape(message["role"]), escape(message["content"]))
            table.add_row(reader, *cells, end_section=number == len(messages))
    return table


def _tokens(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Table:
    """The last tokens of both prompts side by side, and the solution's first as if it were the completion."""
    text = "" if prompt.row is None else prompt.row.columns.get("solution") or prompt.answer or ""
    completion = tokenizer(str(text), add_special_tokens=False)["input_ids"][:COMPLETION_TOKENS]
    table = Table(title=f"{escape(prompt.where)}, where they meet", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column()
    for reader in ("student", "teacher"):
        table.add_column(reader, justify="right", no_wrap=True)
        table.add_column(overflow="fold")
    count = min(PROMPT_TOKENS, len(prompt.student_ids), len(prompt.teacher_ids))
    pairs = list(zip(prompt.student_ids[-count:], prompt.teacher_ids[-count:], strict=True))
    for number, (ours, theirs) in enumerate(pairs, start=1):
        label = "prompt" if number == 1 else "" if ours == theirs else "differs"
        table.add_row(
            label, *_cells(tokenizer, ours), *_cells(tokenizer, theirs), end_section=number == len(pairs)
        )
    for number, token in enumerate(completion):
        cells = _cells(tokenizer, token)
        table.add_row("completion" if number == 0 else "", *cells, *cells)
    return table


def _cells(tokenizer: PreTrainedTokenizerBase, token: int) -> Sequence[str]:
    return str(token), escape(repr(decode(tokenizer, [token])))

"""What a person sees while a run goes on, and the callback that writes the run folder."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from opsd_train.evaluation.examine import from_metrics
from opsd_train.evaluation.passk import Interval
from opsd_train.watch.journal import cut_off
from opsd_train.watch.phases import PHASES
from opsd_train.watch.record import Accuracy, Evaluation, RunRecord

SHOWN = {
    "loss": "loss {:.3f}",
    "forward_kl": "KL {:.3f}",
    "student_entropy": "H {:.2f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "memory_gb": "{:.2f} GB",
}
# Of a loss with clips the KL is told first: the loss can fall while it rises.
SHOWN_CLIPPED = {
    **{name: text for name, text in SHOWN.items() if name != "loss"},
    "clipped_fraction": "clips take {:.0%}",
    "loss": "clipped loss {:.3f}",
}
REDRAWN, PRINTED = 0.2, 30.0  # seconds between two words on how far something has come
TIMES = {f"{name}_seconds": f"{name} {{:.2f}}" for name in PHASES}


class _Bar(Progress):
    """A bar with a line below it."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, and what stands below."""
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below, style="dim", overflow="ellipsis", no_wrap=True)


def say(console: Console, text: str) -> None:
    """A plain line, which is in a file or a pipe at once and unbroken."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class NowAndThen:
    """Passes on what it is told, but not more often than every so many seconds.

    Args:
        show: what is passed on.
        every: seconds.
        at_once: the first word too, which else waits as long.
    """

    def __init__(self, show: Callable[[str], None], every: float, at_once: bool) -> None:
        self.show, self.every = show, every
        self.last = time.monotonic() - every * at_once

    def wait(self) -> None:
        """The next word is passed on after the seconds from now."""
        self.last = time.monotonic()

    def __call__(self, text: str) -> None:
        """Pass it on, if it is time."""
        now = time.monotonic()
        if now - self.last >= self.every:
            self.last = now
            self.show(text)


@contextmanager
def doing(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Say what is done inside: a status that goes again in a terminal, lines elsewhere.

    Yields what may be told, as often as one likes, how far it has come.
    """
    if console.is_terminal:
        with console.status(text) as status:
            yield NowAndThen(lambda told: status.update(f"{text}: {told}"), REDRAWN, True)
    else:
        say(console, f"{text} ...")
        yield NowAndThen(lambda told: say(console, f"{text}: {told}"), PRINTED, False)


def make_progress(console: Console) -> "ProgressCallback | LineCallback":
    """A bar for a terminal; lines for a file or a pipe, where a bar would show at its end alone."""
    return ProgressCallback(console) if console.is_terminal else LineCallback(console)


class LineCallback(TrainerCallback):
    """A plain line per logged step and per evaluation, for output that nobody sees redrawn."""

    def __init__(self, console: Console) -> None:
        self.console, self.step = console, 0
        self.told = NowAndThen(self._evaluating, PRINTED, False)  # of an evaluation on the way

    def _evaluating(self, told: str) -> None:
        say(self.console, f"step {self.step}: evaluating: {told}")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An evaluation, if there is one now, begins here."""
        self.step = state.global_step
        self.told.wait()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the newest metrics."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            spent = "{seconds:,.0f} s".format(seconds=logs.get("seconds", 0.0))
            say(self.console, "  ".join([f"step {state.global_step}/{state.max_steps}", *shown(logs), spent]))
        _say_cut_off(self.console, logs, state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the accuracy."""
        say(self.console, _evaluated(kwargs["metrics"], state.global_step))

    def close(self) -> None:
        """There is nothing to give back."""


def shown(logs: Mapping[str, float]) -> list[str]:
    """What is told of a step's metrics, in words."""
    clipped = logs.get("clipped_fraction", 0.0) > 0
    words = SHOWN_CLIPPED if clipped else SHOWN
    return [text.format(logs[key]) for key, text in words.items() if key in logs]


class ProgressCallback(TrainerCallback):
    """A progress bar with loss, KL divergence, entropy, speed, memory, and the seconds of a step by phase."""

    def __init__(self, console: Console) -> None:
        self.bar = _Bar(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
        )
        self.told = NowAndThen(self._evaluating, REDRAWN, True)  # of an evaluation on the way

    def _evaluating(self, told: str) -> None:
        self.bar.below = f"evaluating: {told}"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the newest metrics."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            spent = [text.format(logs[key]) for key, text in TIMES.items() if logs.get(key, 0) >= 0.005]
            self.bar.below = f"s/step: {'  '.join(spent)}" if spent else ""
            self.bar.update(self.task, description="  ".join(shown(logs)))
        if _say_cut_off(self.bar.console, logs, state.global_step):
            self.bar.below = ""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the accuracy above the bar, where it stays."""
        self.bar.below = ""
        say(self.bar.console, _evaluated(kwargs["metrics"], state.global_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it is."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        self.bar.stop()


class RecordCallback(TrainerCallback):
    """Writes metrics and evaluations into the run folder as they come."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the metrics of a step."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            self.record.log(state.global_step, logs)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write an evaluation."""
        self.record.add_evaluation(from_metrics(kwargs["metrics"], state.global_step))


def _say_cut_off(console: Console, logs: Mapping[str, float], step: int) -> bool:
    """Say that an evaluation was given up, if the logs have it."""
    seconds = logs.get("eval_cut_off_seconds")
    if seconds is not None:
        say(console, f"warning: {cut_off(step, seconds)}")
    return seconds is not None


def _evaluated(metrics: Mapping[str, float], step: int) -> str:
    """An evaluation as a line."""
    found = intervals(from_metrics(metrics, step))
    told = "  ".join(f"{name} {interval(one)}" for name, one in found.items())
    return f"step {step}: held-out accuracy {told}"


def accuracy_table(before: Evaluation, after: Evaluation) -> Table:
    """Held-out accuracy before and after, with 95 % confidence intervals."""
    table = Table(
        title=f"Held-out accuracy ({after['greedy']['total']:,} problems, 95 % confidence interval)"
    )
    for heading in ("decoding", f"before (step {before['step']:,})", f"after (step {after['step']:,})"):
        table.add_column(heading)
    first, last = intervals(before), intervals(after)
    for name, found in last.items():
        table.add_row(name, interval(first[name]) if name in first else "", interval(found))
    return table


def intervals(evaluation: Evaluation) -> dict[str, Interval]:
    """What was measured, by name; pass@1 of several samples is their accuracy, and not told twice."""
    found = {"greedy": _of(evaluation["greedy"]), "sampled": _of(evaluation["sampled"])}
    return found | {
        f"pass@{one['k']}": Interval(value=one["value"], low=one["low"], high=one["high"])
        for one in evaluation.get("pass_at_k", [])
        if one["k"] > 1
    }


def interval(found: Interval) -> str:
    """A share with its interval, in words."""
    return f"{found['value']:.1%}  ({found['low']:.1%} to {found['high']:.1%})"


def _of(found: Accuracy) -> Interval:
    return Interval(value=found["accuracy"], low=found["low"], high=found["high"])

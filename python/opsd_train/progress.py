"""What a person sees while a run goes on, and the callback that writes the run folder."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from opsd_train.record import Accuracy, Evaluation, RunRecord

SHOWN = {
    "loss": "loss {:.3f}",
    "forward_kl": "KL {:.3f}",
    "student_entropy": "H {:.2f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "memory_gb": "{:.2f} GB",
}


class ProgressCallback(TrainerCallback):
    """A progress bar with loss, KL divergence, entropy, tokens per second and memory."""

    def __init__(self, console: Console) -> None:
        self.bar = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
        )

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
            shown = [text.format(logs[key]) for key, text in SHOWN.items() if key in logs]
            self.bar.update(self.task, description="  ".join(shown))

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
        metrics = kwargs["metrics"]
        greedy, sampled = (
            Accuracy(**{key: metrics[f"eval_{name}_{key}"] for key in Accuracy.__annotations__})  # type: ignore[typeddict-item]
            for name in ("greedy", "sampled")
        )
        self.record.add_evaluation(Evaluation(step=state.global_step, greedy=greedy, sampled=sampled))


def accuracy_table(before: Evaluation, after: Evaluation) -> Table:
    """Held-out accuracy before and after, with 95 % confidence intervals."""
    table = Table(
        title=f"Held-out accuracy ({after['greedy']['total']:,} problems, 95 % confidence interval)"
    )
    for heading in ("decoding", f"before (step {before['step']:,})", f"after (step {after['step']:,})"):
        table.add_column(heading)
    for name, first, last in (
        ("greedy", before["greedy"], after["greedy"]),
        ("sampled", before["sampled"], after["sampled"]),
    ):
        table.add_row(name, _interval(first), _interval(last))
    return table


def _interval(found: Accuracy) -> str:
    return f"{found['accuracy']:.1%}  ({found['low']:.1%} to {found['high']:.1%})"

"""What the numbers of a whole run say that no single line does: sentences for the terminal and the report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from opsd_train.evaluation.examine import from_metrics
from opsd_train.watch.record import Evaluation, RunRecord, load_run

LEAST_LINES = 4  # of metrics, before anything is called a trend
RISE = 1.1  # a KL that grew by less is noise of the sampling


def is_clipped(info: Mapping[str, Any], metrics: Sequence[Mapping[str, float]]) -> bool:
    """Whether clips took something from a run's loss: by its objective, or by what was measured."""
    objective = info.get("objective") or {}
    told = any(objective.get(name) is not None for name in ("entry_clip", "token_clip"))
    return told or any(line.get("clipped_fraction", 0.0) > 0 for line in metrics)


def ends(metrics: Sequence[Mapping[str, float]], name: str) -> tuple[float, float] | None:
    """A metric at its first line and its mean over the last quarter of the lines; None for few of them."""
    values = [line[name] for line in metrics if math.isfinite(line.get(name, math.nan))]
    if len(values) < LEAST_LINES:
        return None
    share = len(values) // 4
    return values[0], sum(values[-share:]) / share


def rising(metrics: Sequence[Mapping[str, float]]) -> str | None:
    """A sentence if the KL rises while a loss with clips falls."""
    kl, loss = ends(metrics, "forward_kl"), ends(metrics, "loss")
    if not any(line.get("clipped_fraction", 0.0) > 0 for line in metrics):
        return None
    if kl is None or loss is None or kl[1] <= RISE * kl[0] or loss[1] >= loss[0]:
        return None
    return (
        f"the loss falls ({loss[0]:.3f} to {loss[1]:.3f}) while the forward KL to the teacher rises "
        f"({kl[0]:.3f} to {kl[1]:.3f} nats): the student moves away from the teacher"
    )


def overfits(metrics: Sequence[Mapping[str, float]], evaluations: Sequence[Evaluation]) -> str | None:
    """A sentence if accuracy is under its interval at the start while the KL in training falls."""
    kl = ends(metrics, "forward_kl")
    if len(evaluations) < 2 or kl is None or kl[1] >= kl[0]:
        return None
    first, last = evaluations[0], evaluations[-1]
    for name in ("greedy", "sampled"):
        before, after = first[name], last[name]
        if after["accuracy"] < before["low"]:
            return (
                f"{name} held-out accuracy is {after['accuracy']:.1%} at step {last['step']:,}, under its "
                f"interval at step {first['step']:,} ({before['low']:.1%} to {before['high']:.1%}), while "
                f"the forward KL in training falls ({kl[0]:.3f} to {kl[1]:.3f} nats): the run overfits, or "
                "its teacher does not know better"
            )
    return None


def trends(metrics: Sequence[Mapping[str, float]], evaluations: Sequence[Evaluation]) -> list[str]:
    """What there is to warn of in a run."""
    return [found for found in (rising(metrics), overfits(metrics, evaluations)) if found is not None]


class TrendsCallback(TrainerCallback):
    """Warns of each trend once; of accuracy after two evaluations under the start's, or at the end.

    Args:
        console: where.
        record: of the run, whose earlier lines count.
    """

    def __init__(self, console: Console, record: RunRecord) -> None:
        self.console, self.record = console, record
        self.metrics: list[dict[str, float]] = []
        self.evaluations: list[Evaluation] = []
        self.told: list[str] = []
        self._known: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read what the record holds already."""
        if self.record.exists():
            run = load_run(self.record.directory)
            self.metrics, self.evaluations = run.metrics, run.evaluations

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the newest metrics."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            self.metrics.append(logs)
            self._tell("rising", rising(self.metrics))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the newest accuracy."""
        self.evaluations.append(from_metrics(kwargs["metrics"], state.global_step))
        if overfits(self.metrics, self.evaluations[:-1]):
            self.finish()

    def finish(self) -> None:
        """The last evaluation says it alone."""
        self._tell("overfits", overfits(self.metrics, self.evaluations))

    def _tell(self, name: str, sentence: str | None) -> None:
        if sentence is not None and name not in self._known:
            self._known.add(name)
            self.told.append(sentence)
            self.console.print(f"warning: {sentence}", markup=False, highlight=False, soft_wrap=True)

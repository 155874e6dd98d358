"""The part of the trainer that measures the student: evaluations, and the validation of a search."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase, Trainer

from opsd_train.config import OPSDConfig
from opsd_train.engines.base import Engine
from opsd_train.evaluation.examine import Exam, Findings, to_metrics
from opsd_train.evaluation.matched import missed
from opsd_train.evaluation.verify import Verifier
from opsd_train.reading.prompts import Prompt
from opsd_train.rollouts import Rollout, Sampling
from opsd_train.safety.deadline import OutOfTime, within

TRAINING, EVALUATION = 0, 1  # the streams that random numbers are drawn from


class Examined(Trainer):
    """Evaluates by letting the student complete prompts, whose completions a verifier judges."""

    config: OPSDConfig
    judge: Verifier
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    held_out: Sequence[Prompt]
    validation: Sequence[Prompt]
    engine_behind: bool
    engine: Engine
    was_evaluated = False
    cut_off_at: int | None = None  # the step of an evaluation that its deadline ended
    told: Callable[[str], None] | None = None  # hears how far an evaluation has come

    def roll_out(
        self, prompts: Sequence[Prompt], sampling: Sampling, stream: tuple[int, int]
    ) -> list[Rollout]:
        """Let the student complete every prompt."""
        raise NotImplementedError

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Sequence[Prompt] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Greedy and sampled accuracy of the student and pass@k, with their 95 % intervals.

        After `eval_seconds` it is given up, with the metric `eval_cut_off_seconds` and no other. Several
        processes do so together inside `stops.watched`, as in a run.
        """
        start = time.perf_counter()
        try:
            with within(self.config.eval_seconds):
                found = self.examine(self.held_out if eval_dataset is None else eval_dataset)
        except OutOfTime:
            return self._cut_off({f"{metric_key_prefix}_cut_off_seconds": time.perf_counter() - start})
        self._warn_of_match(found)
        metrics = to_metrics(found.evaluation(self.state.global_step), metric_key_prefix)
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _cut_off(self, metrics: dict[str, float]) -> dict[str, float]:
        self.cut_off_at = self.state.global_step
        self.control.should_evaluate = False  # as after one that is whole
        self.log(metrics)
        return metrics

    def examine(self, prompts: Sequence[Prompt]) -> Findings:
        """Let the student answer `prompts`; ValueError for one that cannot be judged."""
        sampling = dataclasses.replace(self.sampling, batch_size=self.config.per_device_eval_batch_size)
        exam = Exam(self.judge, self.tokenizer, sampling, self.config.eval_samples, self.config.to_ks())
        stream = (EVALUATION, self.state.global_step)

        def write(asked: Sequence[Prompt], drawn: Sampling) -> list[Rollout]:
            if self.told is None:
                return self.roll_out(asked, drawn, stream)
            with self.engine.telling(self.told, drawn):
                return self.roll_out(asked, drawn, stream)

        return exam.hold(write, prompts)

    def _warn_of_match(self, found: Findings) -> None:
        """Warn, at the first evaluation, of completions that are right but for how they are compared."""
        first, self.was_evaluated = not self.was_evaluated, True
        if first and self.judge.name == "exact" and self.is_world_process_zero():
            sentence = missed(found.greedy, self.tokenizer)
            if sentence is not None:
                warnings.warn(sentence, stacklevel=3)

    def validate(self) -> float:
        """Greedy accuracy on the rows held back."""
        greedy = dataclasses.replace(self.sampling, temperature=0.0)
        self.engine_behind = True  # the search moves the weights between steps
        rollouts = self.roll_out(self.validation, greedy, (EVALUATION, self.state.global_step))
        right = self.judge.judge(rollouts, self.tokenizer)
        self.engine_behind = True
        return sum(right) / len(right)

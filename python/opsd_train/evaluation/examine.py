"""An evaluation: accuracy by greedy decoding and by sampling, and pass@k, with 95 % intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from opsd_train.evaluation.judge import wilson
from opsd_train.evaluation.passk import mean_pass_at_k
from opsd_train.evaluation.verify import Verifier
from opsd_train.reading.prompts import Prompt
from opsd_train.rollouts import Rollout, Sampling
from opsd_train.watch.record import Accuracy, Evaluation, PassAtK

Write = Callable[[Sequence[Prompt], Sampling], list[Rollout]]


@dataclass(frozen=True)
class Exam:
    """How a model is examined.

    Args:
        judge: says which completions are right.
        tokenizer: of the completions.
        sampling: how samples are drawn; greedy decoding differs from it in the temperature alone.
        samples: completions sampled per prompt.
        ks: pass@k is estimated for these k, each at most `samples`.
    """

    judge: Verifier
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    samples: int = 1
    ks: tuple[int, ...] = (1,)

    def hold(self, write: Write, prompts: Sequence[Prompt]) -> "Findings":
        """Let the model complete every prompt, once greedily and `samples` times at random.

        Raises ValueError naming the first row that could not be judged.
        """
        self.judge.require(prompts)
        greedy = write(prompts, replace(self.sampling, temperature=0.0))
        sampled = write(list(prompts) * self.samples, self.sampling)
        return Findings(
            Judged(greedy, self.judge.judge(greedy, self.tokenizer)),
            Judged(sampled, self.judge.judge(sampled, self.tokenizer)),
            self.samples,
            self.ks,
        )


@dataclass(frozen=True)
class Judged:
    """Completions, and which of them are right."""

    rollouts: Sequence[Rollout]
    right: Sequence[bool]


@dataclass(frozen=True)
class Findings:
    """What an exam found. Sample j of problem i is `sampled.rollouts[i + j * problems]`.

    Samples of one problem are not independent, so that intervals are over problems: Wilson's where each is
    either solved or not (greedy, one sample, pass@k of all k samples), else by resampling them
    (`passk.bootstrap`).
    """

    greedy: Judged
    sampled: Judged
    samples: int
    ks: tuple[int, ...]

    def counts(self) -> list[int]:
        """Of every problem, how many of its samples are right."""
        problems = len(self.greedy.rollouts)
        return [sum(self.sampled.right[at::problems]) for at in range(problems)]

    def evaluation(self, step: int) -> Evaluation:
        """The numbers, as the record has them."""
        sampled = wilson(sum(self.sampled.right), len(self.sampled.right))
        if self.samples > 1:
            one = self.pass_at_k(1)
            sampled = sampled | {"low": one["low"], "high": one["high"]}
        return Evaluation(
            step=step,
            greedy=wilson(sum(self.greedy.right), len(self.greedy.right)),
            sampled=sampled,
            samples=self.samples,
            pass_at_k=[self.pass_at_k(k) for k in self.ks],
        )

    def pass_at_k(self, k: int) -> PassAtK:
        """The chance that one of k samples is right."""
        counts = self.counts()
        if k < self.samples:
            return PassAtK(k=k, **mean_pass_at_k(counts, self.samples, k))
        solved = wilson(sum(count > 0 for count in counts), len(counts))
        return PassAtK(k=k, value=solved["accuracy"], low=solved["low"], high=solved["high"])


def to_metrics(evaluation: Evaluation, prefix: str = "eval") -> dict[str, float]:
    """An evaluation as plain numbers: `eval_greedy_accuracy`, `eval_pass_at_4_low` and so on."""
    metrics: dict[str, float] = {f"{prefix}_samples": evaluation.get("samples", 1)}
    for name, found in (("greedy", evaluation["greedy"]), ("sampled", evaluation["sampled"])):
        metrics |= {f"{prefix}_{name}_{key}": value for key, value in found.items()}  # type: ignore[misc]
    for one in evaluation.get("pass_at_k", []):
        name = f"{prefix}_pass_at_{one['k']}"
        metrics |= {name: one["value"], f"{name}_low": one["low"], f"{name}_high": one["high"]}
    return metrics


def from_metrics(metrics: Mapping[str, Any], step: int, prefix: str = "eval") -> Evaluation:
    """The evaluation that `to_metrics` made numbers of."""
    head = f"{prefix}_pass_at_"
    ks = sorted(int(name[len(head) :]) for name in metrics if name.startswith(head) and name[-1].isdigit())
    greedy, sampled = (
        Accuracy(**{key: metrics[f"{prefix}_{name}_{key}"] for key in Accuracy.__annotations__})  # type: ignore[typeddict-item]
        for name in ("greedy", "sampled")
    )
    return Evaluation(
        step=step,
        greedy=greedy,
        sampled=sampled,
        samples=metrics[f"{prefix}_samples"],
        pass_at_k=[
            PassAtK(
                k=k,
                value=metrics[f"{head}{k}"],
                low=metrics[f"{head}{k}_low"],
                high=metrics[f"{head}{k}_high"],
            )
            for k in ks
        ],
    )

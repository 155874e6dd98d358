"""What a step's line of metrics says besides the loss."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import psutil
import torch
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from opsd_kernels import Masses, TokenStats
from opsd_train.rollouts import Rollout
from opsd_train.watch.metrics import BUCKETS, bucket_name
from opsd_train.watch.phases import PHASES, Phases

# What the column filter dropped is always 0 here: the driver does not filter.
FIELDS = tuple(name for name in TokenStats._fields if name != "dropped_share")
Total = Callable[[torch.Tensor], torch.Tensor]


class Meter:
    """Sums over the tokens and rollouts since the last line of metrics.

    Times and memory are those of this process; everything else is a mean over the tokens or rollouts of all.

    Args:
        device: whose memory is reported, and whose work is waited for at the end of a step.
        longest: no completion has more tokens.
        total: sums a fp64 vector over all processes; every process calls it at every `read`.
    """

    def __init__(self, device: torch.device, longest: int, total: Total = lambda sums: sums) -> None:
        self.device, self.longest, self.total = device, longest, total
        self._process = psutil.Process()
        self._phases = Phases(device)
        self.start = self._begun = time.perf_counter()
        self._reset()

    def restart(self, spent: float = 0.0) -> None:
        """Training begins, after the seconds that its run has spent; nothing else before it counts."""
        self.start = time.perf_counter() - spent
        self._reset()

    def begin_step(self) -> None:
        """A step's rollouts are about to be drawn."""
        self._begun = time.perf_counter()
        self._phases.begin_step()

    def end_step(self) -> None:
        """The weights have moved. Evaluations and checkpoints come after, and are not the step's time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the step has been queued, not done
        self._busy += time.perf_counter() - self._begun
        self._steps += 1
        self._phases.end_step()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Count the time inside as that of a phase of the step, one of `PHASES`."""
        return self._phases.phase(name)

    def count(self, rollouts: Sequence[Rollout]) -> None:
        """Count the rollouts of a step."""
        self._lengths += [len(rollout.completion) for rollout in rollouts]
        self._truncated += sum(rollout.truncated for rollout in rollouts)

    def reward(self, rewards: Sequence[float]) -> None:
        """Count what the verifier said of a step's rollouts, if it was asked."""
        self._rewards += list(rewards)

    def add(self, stats: TokenStats, mask: torch.Tensor, masses: Masses | None = None) -> None:
        """Add the statistics of a micro-batch's tokens, [B, C]; the columns are positions of completions."""
        self._sums += torch.stack([getattr(stats, name)[mask].double().sum() for name in FIELDS])
        self._measured += mask.sum()
        # What the clips took is a share of the KL of all tokens; most of them have hardly any.
        kl = stats.forward_kl[mask].double()
        kl = torch.where(kl.isfinite(), kl, 1.0)
        self._clipped += torch.stack([(stats.clipped_fraction[mask] * kl).sum(), kl.sum()])
        by_position = torch.stack([torch.where(mask, stats.forward_kl, 0).double().sum(0), mask.sum(0)])
        for at, (start, end) in enumerate(BUCKETS):
            self._buckets[:, at] += by_position[:, start:end].sum(1)
        if masses is not None:
            self._masses += torch.stack([*(mass[mask].double().sum() for mass in masses), mask.sum()])

    def read(self) -> dict[str, float]:
        """The means, and start anew. Lengths in tokens, memory in GB, times in seconds."""
        found = self._over_ranks()
        rollouts, tokens, truncated, reward, rewarded = found["rollouts"].tolist()
        met = found["lengths"].nonzero().flatten().tolist() or [0]
        steps = max(self._steps, 1)
        metrics = {
            "completion_length": tokens / max(rollouts, 1),
            "completion_length_min": float(met[0]),
            "completion_length_max": float(met[-1]),
            "truncated_share": truncated / max(rollouts, 1),
            "tokens_per_second": tokens / self._busy if self._busy else 0.0,
            "step_seconds": self._busy / steps,
            "memory_gb": self.memory_gb(),
            "peak_memory_gb": peak_memory_gb(self.device),
            "seconds": time.perf_counter() - self.start,
        }
        metrics |= {f"{name}_seconds": self._phases.seconds.get(name, 0.0) / steps for name in PHASES}
        if rewarded:
            metrics["reward"] = reward / rewarded
        metrics |= _means(found)
        self._reset()
        return metrics

    def memory_gb(self) -> float:
        """Memory in use: what PyTorch holds of a GPU, or the process's resident memory."""
        if self.device.type == "cuda":
            return torch.cuda.memory_reserved(self.device) / 1e9
        return self._process.memory_info().rss / 1e9

    def _over_ranks(self) -> dict[str, torch.Tensor]:
        """The sums over all processes, in one vector, since a message costs more than what is in it."""
        own = {
            "stats": self._sums,
            "measured": self._measured[None],
            "buckets": self._buckets.flatten(),
            "masses": self._masses,
            "clipped": self._clipped,
            "lengths": torch.bincount(
                torch.tensor(self._lengths, dtype=torch.long), minlength=self.longest + 1
            ),
            "rollouts": torch.tensor(
                [
                    len(self._lengths),
                    sum(self._lengths),
                    self._truncated,
                    sum(self._rewards),
                    len(self._rewards),
                ],
                dtype=torch.float64,
            ),
        }
        vector = torch.cat([part.to(self.device, torch.float64) for part in own.values()])
        parts = self.total(vector).split([len(part) for part in own.values()])
        return dict(zip(own, parts, strict=True))

    def _reset(self) -> None:
        self._busy, self._steps, self._truncated = 0.0, 0, 0
        self._lengths: list[int] = []
        self._rewards: list[float] = []
        self._phases.seconds = {}

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self.device)

        self._sums, self._measured = zeros(len(FIELDS)), zeros()
        self._buckets, self._masses, self._clipped = zeros(2, len(BUCKETS)), zeros(3), zeros(2)


def _means(found: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means over the tokens that were measured, those of no token left out."""
    metrics: dict[str, float] = {}
    if (measured := float(found["measured"])) > 0:
        metrics |= dict(zip(FIELDS, (found["stats"] / measured).tolist(), strict=True))
        removed, whole = found["clipped"].tolist()
        metrics["clipped_fraction"] = removed / whole if whole else 0.0
    sums, counts = found["buckets"].reshape(2, -1).tolist()
    for bucket, kl, count in zip(BUCKETS, sums, counts, strict=True):
        if count:
            metrics[bucket_name(bucket)] = kl / count
    student, teacher, count = found["masses"].tolist()
    if count:
        metrics |= {"student_mass": student / count, "teacher_mass": teacher / count}
    return metrics


def peak_memory_gb(device: torch.device) -> float:
    """Most memory the process has had: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def logs_next(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the step that is under way ends in a line of metrics."""
    step = state.global_step + 1
    if args.logging_strategy != IntervalStrategy.STEPS:
        return args.logging_strategy == IntervalStrategy.EPOCH
    first, last = step == 1 and args.logging_first_step, 0 < state.max_steps <= step
    return step % state.logging_steps == 0 or first or last


class LastStepCallback(TrainerCallback):
    """Ends the last step in a line of metrics, whatever the steps between two lines are."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for the line."""
        if args.logging_strategy == IntervalStrategy.STEPS and state.global_step >= state.max_steps:
            control.should_log = True

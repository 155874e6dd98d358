"""What every engine that writes rollouts does."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opsd_train.rollouts import Sampling


class EngineError(RuntimeError):
    """The engine died, stalled, or does not have the student's weights; the run cannot go on."""


@dataclass(frozen=True)
class Completion:
    """What the student wrote after a prompt.

    Args:
        tokens: up to and including the first end-of-sequence.
        logprobs: of each token as the engine saw them, natural, at temperature 1 and over the whole
            vocabulary, whatever it was sampled with; None if the engine does not say.
        version: optimizer steps of the weights that wrote it.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    version: int = 0


@dataclass(frozen=True)
class Advance:
    """How far a call of `write` has come.

    Args:
        done: completions that are written.
        of: so many.
        at: tokens of those that are under way, where they are written in step; else 0.
    """

    done: int
    of: int
    at: int = 0

    def __str__(self) -> str:
        under_way = f", the next at token {self.at:,}" if self.at else ""
        return f"{self.done:,} of {self.of:,} completions{under_way}"


class Engine:
    """Writes completions with the student's weights of the last `follow`."""

    tell: Callable[[Advance], None] | None = None  # is called often while completions are written

    @contextmanager
    def telling(self, told: Callable[[str], None], sampling: "Sampling") -> Iterator[None]:
        """Inside, how far a call of `write` has come is told in words."""
        how = "sampled" if sampling.temperature > 0 else "greedy"
        self.tell = lambda advance: told(f"{how}, {advance}")
        try:
            yield
        finally:
            self.tell = None

    def write(
        self, prompts: Sequence[Sequence[int]], sampling: "Sampling", seed: Sequence[int]
    ) -> list[Completion]:
        """Complete every prompt.

        Args:
            prompts: token ids.
            sampling: how tokens are drawn.
            seed: what the random numbers are determined by, where the engine can be told.

        Raises:
            EngineError: the engine died or did not answer in time.
        """
        raise NotImplementedError

    def follow(self, version: int) -> None:
        """Take over the student's weights, after `version` optimizer steps.

        Raises:
            EngineError: the weights did not arrive.
        """

    @property
    def versions(self) -> dict[str, str]:
        """What writes beside the trainer's own packages, by name."""
        return {}

    def rest(self) -> None:
        """Rollouts are written for now: make room for training."""

    def close(self) -> None:
        """End what was started; nothing may be left running. May be called twice."""

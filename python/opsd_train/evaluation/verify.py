"""Rewards of rollouts by a verifier: a match with the answer, or a function of the user's own."""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from opsd_train.data import generated
from opsd_train.data.rows import Row
from opsd_train.evaluation.judge import MATCHES
from opsd_train.reading.prompts import Prompt, decode
from opsd_train.rollouts import Rollout
from opsd_train.safety import stops


@dataclass(frozen=True)
class Verifier:
    """A function from a completion to its reward in [0, 1].

    Args:
        name: how options call it.
        function: `function(completion, answer)`; one with a parameter `columns` is given the row's columns by
            that name too.
        needs_answer: whether a prompt without an answer is an error; if not, its answer is None.
        check: raises ValueError for the columns of a row that it does not judge.
    """

    name: str
    function: Callable[..., Any]
    needs_answer: bool = False
    check: Callable[[Mapping[str, Any]], None] | None = None

    @classmethod
    def named(cls, name: str, option: str = "verifier") -> "Verifier":
        """`exact`, `number`, `math`, `reasoning_gym`, or the function at a path `package.module:function`.

        `reasoning_gym` is the score of the package that generated the row.

        Raises ValueError naming the option for any other name and for a path at which there is no function.
        """
        if name in MATCHES:
            return cls(name, MATCHES[name], needs_answer=True)
        if name == "reasoning_gym":
            return cls(name, generated.score, check=generated.check_scored)
        if ":" not in name:
            raise ValueError(
                f"{option}: expected one of {', '.join(MATCHES)}, reasoning_gym, or package.module:function; "
                f"got {name!r}"
            )
        return cls(name, imported(option, name))

    def rewards(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """The reward of each completion of its prompt.

        Raises ValueError naming the row whose answer is missing, or for whose completion the function raises
        or returns anything but a number in [0, 1]; and Stopped if a signal asked for it, see `stops`.
        """
        found = []
        with stops.agreed():
            for text, prompt in zip(completions, prompts, strict=True):
                stops.check()
                found.append(self._reward(text, prompt))
        return found

    def judge(self, rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
        """Whether each completion's text is right: its reward is at least 1/2."""
        texts = [decode(tokenizer, rollout.completion, skip_special_tokens=True) for rollout in rollouts]
        return [reward >= 0.5 for reward in self.rewards(texts, [rollout.prompt for rollout in rollouts])]

    def knows(self, prompt: Prompt) -> bool:
        """Whether completions of the prompt can be judged."""
        return not self.needs_answer or bool((prompt.answer or "").strip())

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError naming the first row that an evaluation could not judge."""
        for prompt in prompts:
            if not self.knows(prompt):
                raise ValueError(
                    f"{prompt.where}: expected an `answer` (or a `solution`) to evaluate against, got none"
                )
            if prompt.row is not None:
                self.check_row(prompt.row)

    def check_row(self, row: Row) -> None:
        """ValueError for a row that is not the verifier's to judge, by its place."""
        if self.check is None:
            return
        try:
            self.check(row.columns)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None

    def _reward(self, completion: str, prompt: Prompt) -> float:
        if self.needs_answer and prompt.answer is None:
            raise ValueError(f"{prompt.where}: expected an answer for verifier {self.name!r}; got none")
        columns = {} if prompt.row is None else prompt.row.columns
        extra = {"columns": columns} if "columns" in inspect.signature(self.function).parameters else {}
        try:
            found = self.function(completion, prompt.answer, **extra)
        except Exception as error:
            raise ValueError(
                f"{prompt.where}: expected a reward from verifier {self.name!r}; it raised "
                f"{type(error).__name__}: {error}"
            ) from error
        try:
            reward = float(found)
        except (TypeError, ValueError):
            reward = math.nan
        if not 0 <= reward <= 1:  # NaN is not either
            raise ValueError(
                f"{prompt.where}: expected a reward in [0, 1] from verifier {self.name!r}; got {found!r}"
            )
        return reward


def imported(option: str, path: str) -> Callable[..., Any]:
    """The function at `package.module:function`; ValueError naming the option if there is none."""
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{option}: expected a function at {path!r}, importable from PYTHONPATH; {error}"
        ) from error
    if not callable(found):
        raise ValueError(f"{option}: expected a function at {path!r}; got a {type(found).__name__}")
    return found

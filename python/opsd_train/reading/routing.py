"""What is known of rollouts: their outcomes, spans of tokens that stand out, which of a teacher's is best."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd_train.reading.prompts import decode

KEY, ERROR = 1, 2  # codes of the data column `span`


@dataclass(frozen=True)
class Outcomes:
    """What is known of the rollouts of a step: `reward` [B] float, `privileged` [B] bool."""

    reward: Tensor
    privileged: Tensor
    threshold: float = 0.5

    @property
    def correct(self) -> Tensor:
        """[B] bool, a reward of at least the threshold."""
        return self.reward >= self.threshold


Annotator = Callable[[str, bool], Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Markers:
    """Annotates the lines of a rollout in which any of some patterns occurs.

    Args:
        key: regular expressions that mark what matters in a rollout that is right.
        error: those that mark where one that is wrong went astray.
    """

    key: tuple[str, ...] = (r"\\boxed", r"(?i)\b(?:therefore|thus|hence)\b")
    error: tuple[str, ...] = (r"\\boxed", r"(?i)\b(?:assume|guess|probably)\b")

    def __call__(self, text: str, correct: bool) -> list[tuple[int, int]]:
        """Spans of characters, first one in and last one out, in the order of the text."""
        found, start = [], 0
        for line in text.splitlines(keepends=True):
            if any(re.search(pattern, line) for pattern in (self.key if correct else self.error)):
                found.append((start, start + len(line.rstrip())))
            start += len(line)
        return found


@dataclass(frozen=True)
class Spans:
    """Marks key spans of rollouts that are right and error spans of those that are wrong (2605.10194).

    Args:
        annotate: `annotate(text, correct)` gives spans of characters `(start, end)`, as `Markers` does.
        most: share of a rollout's tokens that may be in spans; what is beyond it, in the annotator's order,
            is left out.
    """

    annotate: Annotator = Markers()
    most: float = 0.25

    def __call__(
        self,
        completions: Sequence[Sequence[int]],
        correct: Sequence[bool],
        tokenizer: PreTrainedTokenizerBase,
        columns: int,
    ) -> Tensor:
        """The data column `span`, [B, columns] int64: 0 none, 1 key, 2 error.

        Args:
            completions: token ids of the rollouts, without padding.
            correct: whether each is right.
            tokenizer: of the ids.
            columns: of the batch, C.
        """
        codes = torch.zeros(len(completions), columns, dtype=torch.int64)
        for row, (ids, right) in enumerate(zip(completions, correct, strict=True)):
            budget = int(self.most * len(ids) + 1e-9)
            for token in self._tokens(ids, right, tokenizer)[:budget]:
                codes[row, token] = KEY if right else ERROR
        return codes

    def _tokens(self, ids: Sequence[int], correct: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens in spans, each once."""
        text = decode(tokenizer, ids)
        found: dict[int, None] = {}
        for start, end in self.annotate(text, correct):
            if not 0 <= start < end <= len(text):
                raise ValueError(
                    f"annotate: expected spans with 0 <= start < end <= {len(text)}; got {(start, end)}"
                )
            # A character may take several tokens, so the span ends before the token of the next one.
            after = token_at(tokenizer, ids, end) if end < len(text) else len(ids)
            after = max(after, token_at(tokenizer, ids, end - 1) + 1)
            found |= dict.fromkeys(range(token_at(tokenizer, ids, start), after))
        return list(found)


def token_at(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], character: int) -> int:
    """Index of the token in which a character of the decoded text is, by bisection over prefixes."""
    low, high = 0, len(ids) - 1
    while low < high:
        middle = (low + high) // 2
        if len(decode(tokenizer, ids[: middle + 1])) > character:
            high = middle
        else:
            low = middle + 1
    return low


def share_inside(tokens: Tensor, student_top: Tensor) -> float:
    """Share of a teacher's tokens that are among the student's most likely ones.

    Args:
        tokens: `[T]` ids that the teacher wrote.
        student_top: `[T, K]` ids that the student found most likely at the same positions.
    """
    return (student_top == tokens[:, None]).any(dim=1).double().mean().item()


def best_rollout(correct: Sequence[bool], shares: Sequence[float]) -> int:
    """Which of a teacher's rollouts to learn from: a right one first, then the largest share (2605.09725).

    BRTS draws the teacher's rollouts of a prompt with `rollouts.generate`, takes the student's top entries at
    their tokens from one forward pass each, and keeps the best: it then stands beside the student's own as a
    rollout whose column `selected` is True, which the method `brts` imitates.

    Args:
        correct: whether each is right.
        shares: `share_inside` of each. The first of equals is taken.
    """
    if not correct or len(correct) != len(shares):
        raise ValueError(
            f"shares: expected one for each of at least one rollout; got {len(shares)} for {len(correct)}"
        )
    return max(range(len(correct)), key=lambda index: (bool(correct[index]), shares[index]))

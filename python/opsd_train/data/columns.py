"""Columns of data that are made of the rollouts of a step alone: rewards, groups, advantages, spans."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd_kernels.preparers import prepare
from opsd_kernels.registry import Registry
from opsd_kernels.tokens import DATA, Batch
from opsd_train.data.rows import Row
from opsd_train.reading.roles import Reading, group_ids
from opsd_train.reading.routing import Outcomes, Spans
from opsd_train.rollouts import Rollout


@dataclass(frozen=True)
class Step:
    """The rollouts of one optimizer step.

    Args:
        rollouts: R of them.
        rewards: of each; none unless a column or a context needs them.
        readings: what each role reads, by role.
        tokenizer: of the completions.
    """

    rollouts: Sequence[Rollout]
    rewards: Sequence[float]
    readings: Mapping[str, Reading]
    tokenizer: PreTrainedTokenizerBase

    @property
    def outcomes(self) -> Outcomes:
        """Rewards, and whether the first role knows more than the student."""
        first = next(iter(self.readings.values()))
        return Outcomes(torch.tensor(self.rewards), torch.tensor(first.privileged))


# Each gives [R], or [R, C] with a value per token.
step_column: Registry[Callable[[Step], Tensor]] = Registry("column")


@step_column
def reward(step: Step) -> Tensor:
    """What the verifier says, [R]."""
    return step.outcomes.reward


@step_column
def correct(step: Step) -> Tensor:
    """Whether the reward is at least 1/2, [R] bool."""
    return step.outcomes.correct


@step_column
def privileged(step: Step) -> Tensor:
    """Whether the first role's context told anything, [R] bool."""
    return step.outcomes.privileged


@step_column
def group(step: Step) -> Tensor:
    """Which rollouts share a prompt, [R] int64."""
    return torch.tensor(group_ids([row_of(one) for one in step.rollouts]))


@step_column
def advantage(step: Step) -> Tensor:
    """GRPO's, over the rollouts of a prompt in the step, [R]."""
    data = {"reward": reward(step), "group": group(step)}
    batch = Batch(torch.ones(len(step.rollouts), 1, dtype=torch.bool), data)
    return prepare["group_advantage"](batch)["advantage"][:, 0]


@step_column
def span(step: Step) -> Tensor:
    """Key spans of right rollouts and error spans of wrong ones, [R, C] int64."""
    completions = [one.completion for one in step.rollouts]
    longest = max(map(len, completions))
    return Spans()(completions, step.outcomes.correct.tolist(), step.tokenizer, longest)


@step_column
def turn(step: Step) -> Tensor:
    """Rollouts of a single turn, [R, C] int64."""
    longest = max(len(one.completion) for one in step.rollouts)
    return torch.zeros(len(step.rollouts), longest, dtype=torch.int64)


def row_of(rollout: Rollout) -> Row:
    """The row of a rollout's prompt; ValueError for a prompt that was made without one."""
    row = rollout.prompt.row
    if row is None:
        raise ValueError(f"{rollout.prompt.where}: expected a prompt with its row, for a method; got none")
    return row


def cut(column: Tensor, length: int) -> Tensor:
    """The columns of a batch that is shorter than the step's longest rollout."""
    return column if column.dim() == 1 else column[:, :length]


def padded(name: str, values: Any, longest: int) -> Tensor:
    """An annotator's column: a number per rollout, or a list of numbers with one per token."""
    if name not in DATA:
        raise ValueError(f"annotator: expected columns among {', '.join(DATA)}; got {name!r}")
    rows = [list(row) if isinstance(row, Sequence | Tensor) else row for row in values]
    if rows and not isinstance(rows[0], list):
        return torch.tensor(rows)
    return torch.tensor([row[:longest] + [type(row[0])(0)] * (longest - len(row)) for row in rows])

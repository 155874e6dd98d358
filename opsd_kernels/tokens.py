"""What is known of a batch of rollouts, and what the functions of a recipe see of it.

Two kinds of functions make up a method beside its divergences. An *estimator* (`estimators.py`) is a loss of
each token made from the log-probabilities of a few vocabulary entries; it sees `Tokens`. A *weight*
(`weights.py`) is a constant factor of each token's loss; it sees the whole `Batch`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from opsd_kernels.options import TokenStats

# Everything that `loss(data=...)` may hold. "token": a value per token, [B, C]; "sequence": one per sequence,
# [B]; "teachers": one per token and teacher, [B, C, M]. All are constants.
DATA = {
    "advantage": ("token", "A, of a policy gradient; one value per sequence is spread over its tokens"),
    "old_logprob": ("token", "log-prob of the sampled token under the student that this update began with"),
    "rollout_logprob": ("token", "log-prob of the sampled token as the rollout's engine reported it"),
    "reference_logprob": ("token", "log-prob of the sampled token under a frozen reference model"),
    "negative_logprob": ("token", "log-prob of the sampled token under a teacher with a wrong context"),
    "teacher_logprobs": ("teachers", "log-probs of the sampled token under M teachers"),
    "teacher_weight": ("teachers", "factor of each teacher; one row per sequence, [B, M], is spread"),
    "reward": ("sequence", "reward of the rollout"),
    "correct": ("sequence", "whether the rollout is right, bool"),
    "group": ("sequence", "integer that the rollouts of one prompt share"),
    "privileged": ("sequence", "whether the teacher has privileged information for this rollout, bool"),
    "span": ("token", "integer code of the span that the token is in: 0 none, 1 key, 2 error"),
    "turn": ("token", "integer index of the turn or step that the token belongs to, from 0"),
    "selected": ("token", "whether a caller's rule chose the token (audited, tool call, critique), bool"),
    "similarity": ("token", "number of judges, teachers or samples that agree with the token's chunk"),
    "coefficient": ("token", "per-token coefficient of a target or an advantage, say of an extrapolation"),
    "clip_low": ("token", "PPO's bound below: ratios count from 1 - clip_low"),
    "clip_high": ("token", "PPO's bound above: ratios count up to 1 + clip_high"),
    "chunk": ("token", "integer index of the audited chunk that the token is in, -1 none"),
    "confidence": ("teachers", "each teacher's confidence in its answer, 0 to 100; [B, M] is spread"),
    "teacher_mass": ("token", "teacher's mass on the student's most likely entries"),
    "draw": ("token", "number in [0, 1) that decides what is left to chance; drawn where it is not given"),
}


class MissingInput(ValueError):
    """A function of a recipe asked for something that the call was not given."""


class MissingColumn(MissingInput):
    """That was a column of `DATA`."""

    def __init__(self, name: str, given: Mapping[str, Tensor]) -> None:
        self.name = name
        super().__init__(f"data: expected {name!r} ({DATA[name][1]}); got {', '.join(given) or 'none'}")


@dataclass(frozen=True)
class Tokens:
    """The tokens of one chunk as an estimator sees them.

    C tokens, one entry each (the sampled token) unless the estimator has a support of K entries.

    Args:
        log_s: `[C]` or `[C, K]` log s at the entries; the only one with a gradient.
        log_t: the teacher's log t at the same entries, constant; None without a teacher.
        valid: `[C, K]` bool, the entries that exist (a support may have fewer than K); None for `[C]`.
        baseline: `[C]` value of the estimator's baseline divergence, constant; None without one.
        data: what is known of the tokens by the names of `DATA`, `[C]` or `[C, M]`.
    """

    log_s: Tensor
    log_t: Tensor | None = None
    valid: Tensor | None = None
    baseline: Tensor | None = None
    data: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """A column of `data`; ValueError names one that is missing."""
        if name not in self.data:
            raise MissingColumn(name, self.data)
        return self.data[name]

    @property
    def teacher(self) -> Tensor:
        """`log_t`; ValueError without a teacher."""
        if self.log_t is None:
            raise ValueError("teacher: expected one that gives the sampled token's log-prob; got None")
        return self.log_t

    @property
    def log_old(self) -> Tensor:
        """`old_logprob`, or without it the detached log s: the first update after a rollout."""
        return self.data.get("old_logprob", self.log_s.detach())


@dataclass(frozen=True)
class Batch:
    """All tokens of a call as a weight sees them.

    Args:
        mask: `[B, C]` bool, True where a token counts.
        data: constants by the names of `DATA`; those of a sequence are `[B]`, of a token `[B, C]`.
        measure: computes the statistics; called at most once, when a function first asks for them.
    """

    mask: Tensor
    data: Mapping[str, Tensor] = field(default_factory=dict)
    measure: "Callable[[], TokenStats] | None" = None

    def __getitem__(self, name: str) -> Tensor:
        """A column of `data`; ValueError names one that is missing."""
        if name not in self.data:
            raise MissingColumn(name, self.data)
        return self.data[name]

    def per_token(self, name: str) -> Tensor:
        """A column spread over the tokens: `[B]` becomes `[B, 1]`."""
        column = self[name]
        return column[:, None] if column.dim() == 1 else column

    @cached_property
    def stats(self) -> "TokenStats":
        """Statistics of every token, `[B, C]` each, 0 where the mask is False. Costs two matrix products."""
        if self.measure is None:
            raise MissingInput("teacher: expected one whose statistics can be measured; got none")
        return self.measure()

"""What a call of the public functions is told, and the statistics that they return."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from opsd_kernels.objectives import Objective
from opsd_kernels.sources import Source, Teacher

if TYPE_CHECKING:
    from opsd_kernels.recipes import Recipe


class TokenStats(NamedTuple):
    """Per-token statistics without gradient: fp32, shape of the token dimensions, in nats; 0 at dead rows.

    forward_kl is KL(t || s), reverse_kl KL(s || t), jsd the Jensen-Shannon divergence at beta = 1/2, all
    without clips; the log-probs are those of `token_ids`, NaN without them; top1_agreement is 1 or 0;
    clipped_fraction is the share of the divergence that the clips remove; dropped_share what `grad_filter`
    left out.
    """

    forward_kl: Tensor
    """KL(t || s), without clips."""
    reverse_kl: Tensor
    """KL(s || t), without clips."""
    jsd: Tensor
    """Jensen-Shannon divergence at beta = 1/2."""
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprob: Tensor
    """log s of `token_ids`; NaN if there are none."""
    teacher_logprob: Tensor
    """log t of `token_ids`; NaN if there are none."""
    top1_agreement: Tensor
    """1 where both have the same most likely token, else 0."""
    clipped_fraction: Tensor
    """Share of the token's divergence that the objective's clips remove, 1 - clipped / unclipped: above 1
    where the clipped terms sum to less than 0. Of a support that is a part of the vocabulary (`"drop"`,
    `"renormalise_teacher"`), whose terms may sum to anything, the share of the positive terms' sum."""
    dropped_share: Tensor
    """Share of the row's sum of |dL/dz| that `grad_filter` left out of dH and dW; 0 without a filter."""


SourceLike = Tensor | Source
TeacherLike = Tensor | Teacher
TokenWeight = Tensor | Callable[[TokenStats], Tensor]
Denominator = float | Tensor | Mapping[str, float | Tensor] | None


@dataclass(frozen=True)
class LossOptions:
    """The options of `loss`, with its defaults; their meaning is documented there."""

    objective: "str | Objective | Recipe" = "forward_kl"
    mask: Tensor | None = None
    rows: Tensor | None = None
    token_weight: TokenWeight | None = None
    token_ids: Tensor | None = None
    support_ids: Tensor | None = None
    temperature: float = 1.0
    reduction: str = "mean"
    denominator: Denominator = None
    vocab_size: int | None = None
    workspace_bytes: int | None = None
    grad_filter: float | None = None
    main_grad: Tensor | None = None
    backend: str = "auto"
    data: Mapping[str, Tensor] | None = None

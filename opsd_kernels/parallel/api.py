"""The public functions over a sharded vocabulary; `opsd_kernels.api` over a whole one has the arguments."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.api import LossAndStats
from opsd_kernels.options import SourceLike, TokenStats
from opsd_kernels.parallel import logprobs
from opsd_kernels.parallel.calls import Asked, sharded_call
from opsd_kernels.roles import TeacherArgument

_OF_LOGPROBS = frozenset({"mask", "rows", "temperature", "vocab_size", "workspace_bytes", "backend"})
_OF_STATS = _OF_LOGPROBS | {"objective", "token_ids"}


def loss(
    student: SourceLike,
    teacher: TeacherArgument,
    weight: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    reduce_hidden: bool = True,
    **options: Any,
) -> Tensor:
    """`opsd_kernels.loss` of heads whose rows are divided among the ranks of a group.

    Every divergence and clip over the whole vocabulary, temperature, bias, logit scale, soft-cap, columns of
    -inf, weights, and the reductions `"mean"`, `"sum"` and `"none"`. A chunk of tokens costs two gathers of 8
    fp64 numbers a token in all (two more of 16 where statistics are taken), a call one small gather more,
    which finds mistakes, and its backward one all-reduce of the gradient of the hidden states `[N, H]`.

    Args:
        student: hidden states `[..., H]`, the same on every rank, projected by this rank's rows of the head;
            or a source: `Hidden` with the rows of weight and bias, `Logits` with the columns.
        teacher: likewise, of as many columns as the student's on each rank; its H may differ. `Hidden`,
            `Logits`, `LogLinear` or `Routed`.
        weight: `[V_r, H]`, this rank's rows of the head of every bare tensor.
        group: the ranks that hold the vocabulary, each calling this with the same options; None: the default
            group. Not that of data parallelism.
        reduce_hidden: whether the gradient of the student's hidden states is summed over the ranks. False
            leaves each rank its part, for a layer below that sums by itself.
        options: those of `opsd_kernels.loss` without `support_ids`, `grad_filter` and `data`. Token ids and
            `vocab_size` are of the whole vocabulary; `main_grad` is `[V_r, H]`.

    Returns:
        As `opsd_kernels.loss`, with the same bits on every rank. The gradients of weight and bias are those
        of this rank's rows.

    Raises:
        ValueError: names the argument, what was expected and what came; on every rank of the group, also
            where only one is wrong or two differ. A rank that never calls is waited for, until the group's
            timeout.
    """
    asked = Asked("loss", group, reduce_hidden)
    call, _ = sharded_call(asked, student, teacher, weight, options)
    return call.evaluate(with_stats=False)[0]


def loss_and_stats(
    student: SourceLike,
    teacher: TeacherArgument,
    weight: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    reduce_hidden: bool = True,
    **options: Any,
) -> LossAndStats:
    """`loss` and `token_stats` of the same tokens in one walk; the arguments are those of `loss`.

    Raises:
        ValueError: as `loss`.
    """
    asked = Asked("loss_and_stats", group, reduce_hidden)
    call, _ = sharded_call(asked, student, teacher, weight, options)
    value, columns = call.evaluate(with_stats=True)
    return LossAndStats(value, call.stats(columns))


@torch.no_grad()
def token_stats(
    student: SourceLike,
    teacher: TeacherArgument,
    weight: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> TokenStats:
    """`opsd_kernels.token_stats` of sharded heads, with the same bits on every rank.

    The options are those of `opsd_kernels.token_stats` without `support_ids` and `data`.

    Raises:
        ValueError: as `loss`.
    """
    asked = Asked("token_stats", group, False, known=_OF_STATS)
    call, _ = sharded_call(asked, student, teacher, weight, options)
    return call.stats(call.token_stats())


def token_logprobs(
    student: SourceLike,
    token_ids: Tensor,
    weight: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    reduce_hidden: bool = True,
    **options: Any,
) -> Tensor:
    """`opsd_kernels.token_logprobs` of a sharded head: differentiable, with the same bits on every rank.

    A chunk of tokens costs two gathers of 4 fp64 numbers a token in all. The options are those of
    `opsd_kernels.token_logprobs` without `main_grad`.

    Args:
        student: as in `loss`; `Hidden` or `Logits`.
        token_ids: int `[...]`, of the whole vocabulary.
        weight: as in `loss`.
        group: as in `loss`.
        reduce_hidden: as in `loss`.
        options: `mask`, `rows`, `temperature`, `vocab_size`, `workspace_bytes` and `backend`.

    Returns:
        `[...]` in fp32 (fp64 if any input is), 0 at tokens that do not count.

    Raises:
        ValueError: as `loss`.
    """
    asked = Asked("token_logprobs", group, reduce_hidden, known=_OF_LOGPROBS | {"token_ids"})
    call, shard = sharded_call(asked, student, None, weight, {**options, "token_ids": token_ids})
    return logprobs.token_logprobs(call, shard)

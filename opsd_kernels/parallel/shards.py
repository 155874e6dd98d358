"""How a vocabulary is divided among the ranks of a process group, and the sums over them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.parallel.rows import ShardedRows


@dataclass(frozen=True)
class Shard:
    """The columns of this rank among those of the group, in the order of the ranks.

    Args:
        group: the ranks that hold one vocabulary together.
        columns: how many real columns each of them has; padding does not count, 0 is allowed.
    """

    group: dist.ProcessGroup
    columns: tuple[int, ...]

    @property
    def start(self) -> int:
        """Id of this rank's first column."""
        return sum(self.columns[: self.rank])

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def mine(self) -> int:
        """Columns of this rank."""
        return self.columns[self.rank]

    @property
    def vocab(self) -> int:
        """Columns of all ranks."""
        return sum(self.columns)

    @property
    def widest(self) -> int:
        """Columns of the largest part: what every rank plans its chunks by, so that all walk in step."""
        return max(self.columns)

    @property
    def rows(self) -> Any:
        """The row functions that the engine calls as a backend's."""
        return ShardedRows(self)

    def gather(self, x: Tensor) -> Tensor:
        """`[R, ...]` the tensor `[...]` of every rank; one collective."""
        return gathered(x, self.group)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks in their order, so with the same bits on each."""
        return self.gather(x).sum(0)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of this rank for ids of the whole vocabulary, and which ids are among them."""
        here = (ids >= self.start) & (ids < self.start + self.mine)
        return torch.where(here, ids - self.start, 0), here


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[R, ...]` the tensor of every rank, which has the same shape on all."""
    size = dist.get_world_size(group)
    everyone = x.new_empty(size, *x.shape)
    dist.all_gather(list(everyone.unbind(0)), x.contiguous(), group=group)
    return everyone


class Replicated(torch.autograd.Function):
    """A tensor that every rank holds, in the accumulators' dtype; its gradient is summed over the ranks.

    The parts are summed before they are rounded to the tensor's own dtype: rounded first, parts that cancel
    would leave their rounding errors behind.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The tensor itself if it is in fp32 or fp64."""
        ctx.group, ctx.dtype = group, x.dtype
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.view_as(x) if x.dtype == wide else x.to(wide)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """One all-reduce."""
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.to(ctx.dtype), None


def replicated(source: Any, group: dist.ProcessGroup) -> Any:
    """The source with hidden states whose gradient is summed over the ranks, if it has any that need one."""
    hidden = getattr(source, "hidden", None)
    if hidden is None or not hidden.requires_grad or not torch.is_grad_enabled():
        return source
    return replace(source, hidden=Replicated.apply(hidden, group))

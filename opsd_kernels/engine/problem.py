"""One call's work after validation: sources flattened, dead rows known, everything in one place."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.engine.packing import Options
from opsd_kernels.objectives import Objective
from opsd_kernels.sources import Routed, Source, Teacher

# Token statistics of some rows by field name, and the rows' indices in the call -> their weights.
Weigher = Callable[[dict[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Rowwise:
    """What a caller says per token; the token dimensions are flattened to N.

    Args:
        mask: bool `[N]`, True where a token counts.
        rows: int64 `[n]`, the tokens that count, instead of a mask.
        token_weight: float `[N]`.
        token_ids: int64 `[N]`, the sampled tokens.
        support_ids: int64 `[N, K]`, the entries of a support that is given; -1 for none.
    """

    mask: Tensor | None = None
    rows: Tensor | None = None
    token_weight: Tensor | None = None
    token_ids: Tensor | None = None
    support_ids: Tensor | None = None

    def live(self) -> Tensor | None:
        """`[n]` indices of the rows that count and have a weight; None for all. Waits for a mask on a GPU."""
        if self.rows is not None:
            return self.rows
        keep = self.mask
        if self.token_weight is not None:
            nonzero = self.token_weight != 0
            keep = nonzero if keep is None else keep & nonzero
        return None if keep is None else keep.nonzero()[:, 0]


@dataclass(frozen=True)
class Problem:
    """Student and teacher over N rows, of which n are live.

    Args:
        student: source with `[N, H]` or `[N, V]` tensors; the only one that receives gradients.
        teacher: likewise, constant.
        options: objective, temperature and the rest.
        rows: `[n]` int64 indices of the live rows, None when all N are. Dead rows never reach a GEMM.
        weight: `[n]` factor of each live row's loss.
        token_ids: `[n]` sampled tokens of the live rows, or None.
        support_ids: `[n, K]` entries of a given support, or None.
        routes: for a `Routed` teacher, how many of the live rows each of its sources has; the live rows are
            sorted by source.
        weigher: gives the rows' weights from their statistics, instead of `weight`.
        widest: columns by which chunks of rows are planned, where they are not V: ranks that hold unequal
            parts of a vocabulary have to walk in step.
    """

    student: Source
    teacher: Teacher
    options: Options
    rows: Tensor | None
    weight: Tensor
    token_ids: Tensor | None = None
    support_ids: Tensor | None = None
    routes: tuple[int, ...] = ()
    weigher: Weigher | None = None
    widest: int | None = None

    @classmethod
    def of(cls, student: Source, teacher: Teacher, options: Options, rowwise: Rowwise) -> "Problem":
        """Finds the live rows and takes what is said of them."""
        rows = rowwise.live()
        routes: tuple[int, ...] = ()
        total = student.lead.numel()
        device = student.tensors[0].device
        if isinstance(teacher, Routed):
            rows = torch.arange(total, device=device) if rows is None else rows
            rows, routes = _by_route(rows, teacher)

        def taken(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or rows is None else tensor[rows]

        count = total if rows is None else rows.numel()
        weight = taken(rowwise.token_weight)
        problem = cls(
            student=student,
            teacher=teacher,
            options=options,
            rows=rows,
            weight=torch.ones(count, device=device) if weight is None else weight,
            token_ids=taken(rowwise.token_ids),
            support_ids=taken(rowwise.support_ids),
            routes=routes,
        )
        return replace(problem, weight=problem.weight.to(problem.dtype))

    @property
    def objective(self) -> Objective:
        """The token loss."""
        return self.options.objective

    @property
    def temperature(self) -> float:
        """T; both distributions are softmax(z / T). The loss carries no factor T^2."""
        return self.options.temperature

    @property
    def total_rows(self) -> int:
        """N."""
        return self.student.lead.numel()

    @property
    def live_rows(self) -> int:
        """n."""
        return self.total_rows if self.rows is None else self.rows.numel()

    @property
    def vocab(self) -> int:
        """V."""
        return self.student.vocab

    @property
    def device(self) -> torch.device:
        """Where every tensor of the problem lives."""
        return self.student.tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of logits, statistics and accumulators."""
        return accumulator_dtype(self.student, self.teacher)

    @property
    def like(self) -> dict[str, Any]:
        """Dtype and device of new tensors."""
        return {"dtype": self.dtype, "device": self.device}

    def index(self, span: slice) -> Tensor:
        """`[C]` indices in the call of the live rows `span`."""
        if self.rows is None:
            return torch.arange(span.start, span.stop, device=self.device)
        return self.rows[span]

    def scatter(self, live: Tensor) -> Tensor:
        """`[n, ...]` values of the live rows as `[N, ...]`, zero elsewhere."""
        if self.rows is None:
            return live
        return live.new_zeros(self.total_rows, *live.shape[1:]).index_copy_(0, self.rows, live)


def accumulator_dtype(student: Source, teacher: Teacher) -> torch.dtype:
    """fp32, or fp64 if any input is fp64."""
    double = any(x.dtype == torch.float64 for x in (*student.tensors, *teacher.tensors))
    return torch.float64 if double else torch.float32


def _by_route(rows: Tensor, teacher: Routed) -> tuple[Tensor, tuple[int, ...]]:
    """The live rows sorted by their teacher, and how many each teacher has."""
    index = teacher.index[rows].long()
    count = len(teacher.sources)
    sizes = torch.bincount(index, minlength=count).tolist()
    if len(sizes) > count:
        raise ValueError(f"teacher.index: expected values in [0, {count}); got {len(sizes) - 1}")
    return rows[index.argsort(stable=True)], tuple(sizes)

"""One call's work after validation: sources flattened, dead rows known, everything in one place."""

from dataclasses import dataclass

import torch

from opsd_kernels.objectives import Objective
from opsd_kernels.sources import Source


@dataclass(frozen=True)
class Problem:
    """Student and teacher over N rows, of which n are live.

    Args:
        student: source with `[N, H]` or `[N, V]` tensors; the only one that receives gradients.
        teacher: likewise, constant.
        objective: the token loss.
        temperature: T; both distributions are softmax(z / T). The loss carries no factor T^2.
        rows: `[n]` int64 indices of the live rows, None when all N are. Dead rows never reach a GEMM.
        weight: `[n]` factor of each live row's loss.
        workspace_bytes: budget for the two logits buffers, None for the device's default.
    """

    student: Source
    teacher: Source
    objective: Objective
    temperature: float
    rows: torch.Tensor | None
    weight: torch.Tensor
    workspace_bytes: int | None

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
        return self.student.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of logits, statistics and accumulators: fp32, or fp64 if any input is fp64."""
        tensors = [x for x in (*self.student.tensors, *self.teacher.tensors) if x is not None]
        return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32

    def scatter(self, live: torch.Tensor) -> torch.Tensor:
        """`[n, ...]` values of the live rows as `[N, ...]`, zero elsewhere."""
        if self.rows is None:
            return live
        return live.new_zeros(self.total_rows, *live.shape[1:]).index_copy_(0, self.rows, live)

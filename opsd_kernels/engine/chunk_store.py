"""Design A: the logits of a chunk of rows are stored, used and overwritten; four GEMMs for every divergence.

The gradient is formed in the forward pass, so that nothing of size [N, V] has to survive until backward.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from opsd_kernels.engine import plan
from opsd_kernels.engine.problem import Problem
from opsd_kernels.engine.projection import Projection, mm_, prepare_pair
from opsd_kernels.sources import Hidden

ALL = slice(None)


@dataclass(frozen=True)
class Chunks:
    """Two reusable `[C, V]` logits buffers and the walk over the live rows that fills them."""

    student: Projection
    teacher: Projection
    spans: list[slice]
    buffers: torch.Tensor

    @classmethod
    def of(cls, problem: Problem, trainable_head: bool = False) -> "Chunks":
        """Plans the chunks of a problem and allocates the buffers."""
        student, teacher = prepare_pair(
            problem.student, problem.teacher, problem.rows, problem.temperature, problem.dtype
        )
        itemsize = problem.dtype.itemsize
        budget = plan.workspace_bytes(
            problem.workspace_bytes, problem.vocab, itemsize, problem.device.type, trainable_head
        )
        rows = plan.length(problem.live_rows, problem.vocab * itemsize, budget)
        buffers = torch.empty(2, rows, problem.vocab, dtype=problem.dtype, device=problem.device)
        return cls(student, teacher, plan.spans(problem.live_rows, rows), buffers)

    def logits(self, span: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Student's and teacher's z / T of the live rows `span`; valid until the next call."""
        z_s, z_t = self.buffers[:, : span.stop - span.start]
        self.student.logits_(z_s, span, ALL)
        self.teacher.logits_(z_t, span, ALL)
        return z_s, z_t


def loss_and_gradients(
    problem: Problem, backend: ModuleType, wanted: tuple[bool, ...]
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Weighted sum of the token losses and its gradients by the student's tensors.

    Args:
        problem: the work.
        backend: module with `row_gradient_`.
        wanted: for each of `problem.student.tensors`, whether its gradient is needed.

    Returns:
        The scalar loss in `problem.dtype`, and for each tensor its gradient in `problem.dtype` or None;
        those of hidden states and logits hold the live rows only.
    """
    gradients = Gradients.zeros(problem, wanted)
    chunks = Chunks.of(problem, trainable_head=gradients.weight is not None)
    loss = torch.zeros((), dtype=problem.dtype, device=problem.device)
    for span in chunks.spans:
        z_s, z_t = chunks.logits(span)
        weight = problem.weight[span]
        losses = backend.row_gradient_(z_s, z_t, problem.objective, weight * chunks.student.slope)
        loss += (losses * weight).sum()  # autocast would round the operands of `@`
        chunks.student.through_cap_(z_t, z_s)
        gradients.add_(chunks.student, z_t, span)
    return loss, gradients.as_list()


def loss_only(problem: Problem, backend: ModuleType) -> torch.Tensor:
    """Weighted sum of the token losses with two GEMMs, when no gradient is needed."""
    chunks = Chunks.of(problem)
    loss = torch.zeros((), dtype=problem.dtype, device=problem.device)
    for span in chunks.spans:
        losses = backend.row_loss(*chunks.logits(span), problem.objective).loss
        loss += (losses * problem.weight[span]).sum()
    return loss


def token_stats(
    problem: Problem, backend: ModuleType, token_ids: torch.Tensor
) -> list[dict[str, torch.Tensor]]:
    """Statistics of the live rows, a dict of `[C]` tensors per chunk; `token_ids` is `[n]`."""
    chunks = Chunks.of(problem)
    return [
        backend.row_stats(*chunks.logits(span), problem.objective, token_ids[span]) for span in chunks.spans
    ]


@dataclass
class Gradients:
    """Accumulators in `problem.dtype` for the student's tensors; None where no gradient is needed.

    dW is summed over the chunks in fp32, whatever the head's dtype, so its error does not grow with them.
    """

    hidden: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    z: torch.Tensor | None = None
    dense: bool = False

    @classmethod
    def zeros(cls, problem: Problem, wanted: tuple[bool, ...]) -> "Gradients":
        """Allocates what is wanted; the first chunk overwrites, so only an empty walk needs zeros."""
        allocate = torch.zeros if problem.live_rows == 0 else torch.empty
        n, student = problem.live_rows, problem.student
        like: dict[str, Any] = {"dtype": problem.dtype, "device": problem.device}
        if not isinstance(student, Hidden):
            return cls(z=allocate(n, problem.vocab, **like) if wanted[0] else None, dense=True)
        hidden = allocate(n, student.hidden.shape[1], **like) if wanted[0] else None
        weight = allocate(student.weight.shape, **like) if wanted[1] else None
        bias = torch.zeros(problem.vocab, **like) if wanted[2] else None
        return cls(hidden, weight, bias)

    def add_(self, student: Projection, dz: torch.Tensor, span: slice) -> None:
        """Adds a chunk's part; `dz` `[C, V]` is the gradient of `hidden @ weight.T + bias`, or of z."""
        if self.z is not None:
            self.z[span] = dz
            return
        assert isinstance(student.source, Hidden)
        operand = student.operand(dz)
        if self.hidden is not None:
            mm_(self.hidden[span], operand, student.source.weight)
        if self.weight is not None:
            mm_(self.weight, operand.T, student.hidden(span), accumulate=span.start > 0)
        if self.bias is not None:
            self.bias += dz.sum(0)

    def as_list(self) -> list[torch.Tensor | None]:
        """In the order of the source's `tensors`."""
        return [self.z] if self.dense else [self.hidden, self.weight, self.bias]

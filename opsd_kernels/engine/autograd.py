"""The two autograd functions, one per design. Only the student's tensors receive gradients."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.engine import chunk_store, slab_recompute
from opsd_kernels.engine.problem import Problem
from opsd_kernels.engine.rows import RowStatistics


def weighted_sum(problem: Problem, backend: ModuleType) -> Tensor:
    """Scalar sum of weight x token loss, by design A; without gradient the two logits GEMMs alone.

    A mean divides it afterwards, so that its 1 / N reaches the fp32 gradients in the backward: in the fp16
    operands of the GEMMs it would underflow.
    """
    if not _needs_gradient(problem):
        with torch.no_grad():  # a tensor of the teacher's may still be a parameter
            return chunk_store.loss_only(problem, backend)
    return _ChunkStore.apply(problem, backend, *problem.student.tensors)


def token_loss(problem: Problem, backend: ModuleType) -> Tensor:
    """`[n]` token losses of the live rows, by design B."""
    if not _needs_gradient(problem):
        with torch.no_grad():
            return slab_recompute.forward(problem, backend).loss
    return _SlabRecompute.apply(problem, backend, *problem.student.tensors)


def _needs_gradient(problem: Problem) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in problem.student.tensors
    )


class _ChunkStore(torch.autograd.Function):
    """Gradients are formed in the forward; the backward multiplies them by the upstream scalar."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, backend: ModuleType, *tensors: Tensor | None) -> Tensor:
        wanted = ctx.needs_input_grad[2:]
        loss, gradients = chunk_store.loss_and_gradients(problem, backend, wanted)
        ctx.save_for_backward(problem.rows, *gradients)
        ctx.shapes = [None if x is None else (x.shape, x.dtype) for x in tensors]
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        _refuse_second_derivative()
        rows, *gradients = ctx.saved_tensors
        scaled = [None if x is None else x * upstream for x in gradients]
        return None, None, *_as_inputs(scaled, rows, ctx.shapes)


class _SlabRecompute(torch.autograd.Function):
    """The forward saves row statistics; the backward recomputes the logits."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, backend: ModuleType, *tensors: Tensor | None) -> Tensor:
        statistics = slab_recompute.forward(problem, backend)
        ctx.problem, ctx.backend = problem, backend
        # Inputs are saved through autograd, which raises if one is changed in place before the backward; it
        # cannot save those of torch.inference_mode().
        teacher = [x for x in problem.teacher.tensors if x is not None and not x.is_inference()]
        ctx.save_for_backward(problem.rows, *tensors, *teacher, *statistics)
        return statistics.loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        _refuse_second_derivative()
        rows, *rest = ctx.saved_tensors
        tensors = rest[: len(ctx.problem.student.tensors)]
        statistics = RowStatistics(*rest[-len(RowStatistics._fields) :])
        gradients = slab_recompute.backward(
            ctx.problem, ctx.backend, statistics, upstream, ctx.needs_input_grad[2:]
        )
        shapes = [None if x is None else (x.shape, x.dtype) for x in tensors]
        return None, None, *_as_inputs(gradients, rows, shapes)


def _refuse_second_derivative() -> None:
    """PyTorch's `once_differentiable` lets it pass as zero if the upstream gradient is a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "opsd_kernels.loss: there is no second derivative; got backward with create_graph=True"
        )


def _as_inputs(
    gradients: list[Tensor | None],
    rows: Tensor | None,
    shapes: list[tuple[torch.Size, torch.dtype] | None],
) -> list[Tensor | None]:
    """Gradients in the inputs' dtypes, rounded once; the first one spread from the live rows over all N."""
    results: list[Tensor | None] = []
    for index, (gradient, shape) in enumerate(zip(gradients, shapes, strict=True)):
        if gradient is None or shape is None:
            results.append(None)
            continue
        gradient = gradient.to(shape[1])
        if index == 0 and rows is not None:
            gradient = gradient.new_zeros(shape[0]).index_copy_(0, rows, gradient)
        results.append(gradient)
    return results

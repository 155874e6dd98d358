"""Log-probabilities of the sampled tokens under a sharded head, with their gradient."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import ops
from opsd_kernels.backends.torch.rows import softmax_gradient_
from opsd_kernels.call import Call
from opsd_kernels.engine import packing, plan
from opsd_kernels.engine.gradients import Gradients, safe_unit
from opsd_kernels.engine.problem import Problem
from opsd_kernels.engine.projection import Projection
from opsd_kernels.engine.rows import GradientForm
from opsd_kernels.engine.teachers import prepare
from opsd_kernels.parallel.shards import Shard

ALL = slice(None)


def token_logprobs(call: Call, shard: Shard) -> Tensor:
    """`[...]` log-probs of the call's token ids. Its teacher is there for form alone: nothing projects it."""
    found: Tensor = _TokenLogProbs.apply(call, shard, *call.student.tensors)
    return found.reshape(call.lead)


@dataclass(frozen=True)
class _Walk:
    """The logits of one chunk of rows after another, this rank's columns of them, in one buffer."""

    problem: Problem
    student: Projection
    spans: list[slice]
    buffer: Tensor

    @classmethod
    def of(cls, problem: Problem, trainable_head: bool) -> "_Walk":
        student, _ = prepare(problem)
        rows = plan.chunk_rows(problem, problem.dtype.itemsize, trainable_head)
        buffer = torch.empty(rows, problem.vocab, **problem.like)
        return cls(problem, student, plan.spans(problem.live_rows, rows), buffer)

    def fill_(self, span: slice) -> Tensor:
        """z / T of the live rows `span`."""
        z = self.buffer[: span.stop - span.start]
        self.student.logits_(z, span, ALL)
        return z


class _TokenLogProbs(torch.autograd.Function):
    """`[N]` log-probs; the backward recomputes the logits and needs nothing of the other ranks."""

    @staticmethod
    def forward(ctx: Any, call: Call, shard: Shard, *student: Tensor) -> Tensor:
        problem = Problem.of(call.student, call.teacher, call.packed, call.rowwise)
        problem = replace(problem, widest=shard.widest)
        assert problem.token_ids is not None
        walk = _Walk.of(problem, trainable_head=True)
        row = torch.zeros(3, problem.live_rows, dtype=torch.float64, device=problem.device)
        for span in walk.spans:
            z = walk.fill_(span)
            (normaliser,) = shard.rows.of_whole_rows(z)
            columns, here = shard.local(problem.token_ids[span])
            top, log_sum = normaliser.top.double(), normaliser.total.log()
            log_p = torch.where(here, _at(z, columns).double() - top - log_sum, 0.0)
            row[:, span] = torch.stack((shard.sum(log_p), top, log_sum))
        ops.save(ctx, [*student, problem.rows, problem.token_ids, row])
        ctx.shard, ctx.wanted = shard, [x.requires_grad for x in student]
        ctx.text = packing.pack(call.student, call.student, call.packed)
        return problem.scatter(row[0].to(problem.dtype))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        ops.refuse_second_derivative()
        *student, rows, ids, row = ops.saved(ctx)
        source, _, options = packing.unpack(ctx.text, student, student)
        weight = upstream if rows is None else upstream[rows]
        problem = Problem(source, source, options, rows, weight, ids, widest=ctx.shard.widest)
        found = _gradients(problem, ctx.shard, row, ctx.wanted)
        gradients = [None if x is None else x.to(y.dtype) for x, y in zip(found, student, strict=True)]
        return None, None, *gradients


def _gradients(problem: Problem, shard: Shard, row: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    """Gradients of the student's tensors; `row` `[3, n]` has log p, the maximum and the log of the sum."""
    assert problem.token_ids is not None
    gradients = Gradients.of(problem, wanted)
    walk = _Walk.of(problem, trainable_head=gradients.weight is not None)
    form = GradientForm(walk.student.operand_dtype, walk.student.cap)
    unit = safe_unit(problem.weight, form.dtype)
    for span in walk.spans:
        z = walk.fill_(span)
        columns, here = shard.local(problem.token_ids[span])
        scale = (problem.weight[span] if unit is None else problem.weight[span] / unit) * walk.student.slope
        log_p, top, log_sum = row[:, span]
        # 1 - p, which a difference would round to nothing where p is near 1.
        inside = -torch.expm1(log_p).to(z.dtype) * scale
        if form.cap is not None:
            inside = inside * (1 - (_at(z, columns) / form.cap).square())
        dz = softmax_gradient_(z, z, top.to(z.dtype), log_sum.to(z.dtype), -scale, form)
        if dz.shape[1]:
            kept = torch.where(here, inside.to(dz.dtype), _at(dz, columns))
            dz.scatter_(1, columns[:, None], kept[:, None])
        gradients.add_(walk.student, dz, span)
    gradients.scale_(unit)
    return gradients.as_list(len(wanted))


def _at(z: Tensor, columns: Tensor) -> Tensor:
    """`[C]` a column of each row of `[C, V_r]`; 0 where a rank has none."""
    return z.gather(1, columns[:, None])[:, 0] if z.shape[1] else z.new_zeros(z.shape[0])

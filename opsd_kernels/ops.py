"""The engine as PyTorch operators, so that autograd, torch.compile and fake tensors know it.

`weighted_sum` is design A, `token_loss` with `token_loss_backward` design B, `token_stats` the statistics.
Each takes the student's and the teacher's tensors as lists and everything else as text
(`engine/packing.py`). The gradients that `weighted_sum` forms are results of the operator, which the backward
scales.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import backends
from opsd_kernels.engine import chunk_store, packing, slab_recompute
from opsd_kernels.engine.problem import Problem, Rowwise, Weigher, accumulator_dtype
from opsd_kernels.engine.rows import RowStatistics

STATS = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "student_entropy",
    "teacher_entropy",
    "student_logprob",
    "teacher_logprob",
    "top1_agreement",
    "clipped_fraction",
    "dropped_share",
)

_ROWWISE = "Tensor? mask, Tensor? rows, Tensor? token_weight, Tensor? token_ids, Tensor? support_ids"
INPUTS = f"Tensor[] student, Tensor[] teacher, {_ROWWISE}, str options"
library = torch.library.Library("opsd_kernels", "DEF")
library.define(
    f"weighted_sum({INPUTS}, Tensor? main_grad, bool[] wanted, bool stats) -> (Tensor, Tensor, Tensor[])"
)
library.define(f"token_loss({INPUTS}, Tensor? main_grad, bool stats) -> (Tensor, Tensor, Tensor)")
library.define(
    f"token_loss_backward({INPUTS}, Tensor statistics, Tensor upstream, bool[] wanted) -> Tensor[]"
)
library.define(f"token_stats({INPUTS}) -> Tensor")

_weighers: dict[int, Weigher] = {}
_shards: list[Any] = []
_handles = count()


@contextmanager
def registered(weigher: Weigher | None) -> Iterator[int | None]:
    """A handle by which an operator's options can name a function, while the context lasts."""
    if weigher is None:
        yield None
        return
    handle = next(_handles)
    _weighers[handle] = weigher
    try:
        yield handle
    finally:
        del _weighers[handle]


def shard_handle(shard: Any) -> int:
    """A handle by which an operator's options can name a `parallel.shards.Shard`; a backward may ask late."""
    if shard not in _shards:
        _shards.append(shard)
    return _shards.index(shard)


def problem_of(
    student: list[Tensor], teacher: list[Tensor], rowwise: Sequence[Tensor | None], text: str
) -> tuple[Problem, Any]:
    """The work, and the backend's module."""
    s, t, options = packing.unpack(text, student, teacher)
    problem = Problem.of(s, t, options, Rowwise(*rowwise))
    if options.weigher is not None:
        problem = replace(problem, weigher=_weighers[options.weigher])
    if options.shard is not None:
        shard = _shards[options.shard]
        return replace(problem, widest=shard.widest), shard.rows
    return problem, backends.load(options.backend, problem.device, problem.dtype)


def spread(problem: Problem, stats: dict[str, Tensor]) -> Tensor:
    """`[N, fields]` fp32 token statistics, 0 at dead rows."""
    if not stats:
        return torch.zeros(problem.total_rows, len(STATS), dtype=torch.float32, device=problem.device)
    return problem.scatter(torch.stack([stats[name].float() for name in STATS], dim=1))


def _weighted_sum(
    student: list[Tensor], teacher: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *rowwise, text, _main_grad, wanted, with_stats = rest
    problem, backend = problem_of(student, teacher, rowwise, text)
    if any(wanted):
        found = chunk_store.loss_and_gradients(problem, backend, wanted, with_stats)
    else:
        found = chunk_store.loss_only(problem, backend, with_stats)
    formed = found.gradients or [None] * len(student)
    gradients = [x.new_empty(0) if y is None else y for x, y in zip(student, formed, strict=True)]
    stats = spread(problem, found.stats) if with_stats else found.loss.new_empty(0, dtype=torch.float32)
    return found.loss, stats, gradients


def _weighted_sum_fake(
    student: list[Tensor], teacher: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *_, text, _main_grad, wanted, with_stats = rest
    s, t, _ = packing.unpack(text, student, teacher)
    dtype = accumulator_dtype(s, t)
    gradients = empty_gradients(student, wanted, dtype)
    stats = student[0].new_empty((student[0].shape[0], len(STATS)) if with_stats else 0, dtype=torch.float32)
    return student[0].new_empty((), dtype=dtype), stats, gradients


def empty_gradients(student: list[Tensor], wanted: list[bool], dtype: torch.dtype) -> list[Tensor]:
    """One for each of the student's tensors, of no elements where none is wanted."""
    return [
        torch.empty(x.shape, dtype=dtype, device=x.device) if want else x.new_empty(0)
        for x, want in zip(student, wanted, strict=True)
    ]


def _save_weighted_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, stats, gradients = output
    ctx.mark_non_differentiable(stats, *gradients)
    ctx.save_for_backward(*gradients)
    ctx.teachers, ctx.arguments = len(inputs[1]), len(inputs)
    ctx.main_grad, ctx.wanted = inputs[-3], inputs[-2]
    ctx.dtypes = [x.dtype for x in inputs[0]]


def _weighted_sum_backward(ctx: Any, upstream: Tensor, *_unused: Any) -> tuple[Any, ...]:
    refuse_second_derivative()
    formed = [x if want else None for x, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)]
    results = scaled_gradients(formed, upstream, ctx.dtypes, ctx.main_grad)
    return results, [None] * ctx.teachers, *[None] * (ctx.arguments - 2)


def scaled_gradients(
    formed: Sequence[Tensor | None], upstream: Tensor, dtypes: Sequence[torch.dtype], main_grad: Tensor | None
) -> list[Tensor | None]:
    """The gradients times the upstream one, in the inputs' dtypes; the head's to `main_grad` if given."""
    results: list[Tensor | None] = []
    for index, (gradient, dtype) in enumerate(zip(formed, dtypes, strict=True)):
        if gradient is None:
            results.append(None)
        elif index == 1 and main_grad is not None:
            main_grad.addcmul_(gradient, upstream)
            results.append(None)
        else:
            results.append(_scaled(gradient, upstream, dtype))
    return results


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * upstream in the input's dtype, rounded once, without a copy in between."""
    if gradient.dtype == dtype:
        return gradient * upstream
    return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))


def _token_loss(student: list[Tensor], teacher: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rowwise, text, _main_grad, with_stats = rest
    problem, backend = problem_of(student, teacher, rowwise, text)
    rows, stats = slab_recompute.forward(problem, backend, with_stats)
    loss = problem.scatter(rows[:, 0].to(problem.dtype))
    columns = spread(problem, stats) if with_stats else loss.new_empty(0, dtype=torch.float32)
    # A result may not share memory with another one.
    return loss.clone() if loss.data_ptr() == rows.data_ptr() else loss, problem.scatter(rows), columns


def _token_loss_fake(
    student: list[Tensor], teacher: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, text, _main_grad, with_stats = rest
    s, t, _ = packing.unpack(text, student, teacher)
    n, first = student[0].shape[0], student[0]
    stats = first.new_empty((n, len(STATS)) if with_stats else 0, dtype=torch.float32)
    statistics = first.new_empty((n, len(RowStatistics._fields)), dtype=torch.float64)
    return first.new_empty(n, dtype=accumulator_dtype(s, t)), statistics, stats


def _save_token_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    student, teacher, *rowwise, text, main_grad, _ = inputs
    _, statistics, stats = output
    ctx.mark_non_differentiable(statistics, stats)
    save(ctx, [*student, *teacher, *rowwise, statistics])
    ctx.counts = len(student), len(teacher)
    ctx.text, ctx.main_grad = text, main_grad
    ctx.wanted = [x.requires_grad for x in student]


def save(ctx: Any, tensors: list[Tensor | None]) -> None:
    """Saves through autograd, which raises if one is changed in place before the backward.

    It cannot save those of torch.inference_mode().
    """
    ctx.kept = [x if x is not None and x.is_inference() else None for x in tensors]
    ctx.save_for_backward(*[None if y is not None else x for x, y in zip(tensors, ctx.kept, strict=True)])


def saved(ctx: Any) -> list[Any]:
    """What was saved."""
    return [y if x is None else x for x, y in zip(ctx.saved_tensors, ctx.kept, strict=True)]


def _token_loss_backward_formula(ctx: Any, upstream: Tensor, *_unused: Any) -> tuple[Any, ...]:
    refuse_second_derivative()
    tensors = saved(ctx)
    s, t = ctx.counts
    student, teacher, rowwise, statistics = tensors[:s], tensors[s : s + t], tensors[s + t : -1], tensors[-1]
    found = torch.ops.opsd_kernels.token_loss_backward(
        student, teacher, *rowwise, ctx.text, statistics, upstream, ctx.wanted
    )
    gradients = [
        x.to(y.dtype) if want else None for x, y, want in zip(found, student, ctx.wanted, strict=True)
    ]
    if ctx.main_grad is not None:
        ctx.main_grad.add_(found[1])
        gradients[1] = None
    return gradients, [None] * t, *[None] * (len(rowwise) + 3)


def _token_loss_backward(student: list[Tensor], teacher: list[Tensor], *rest: Any) -> list[Tensor]:
    *rowwise, text, statistics, upstream, wanted = rest
    problem, backend = problem_of(student, teacher, rowwise, text)
    if problem.rows is not None:
        statistics, upstream = statistics[problem.rows], upstream[problem.rows]
    found = slab_recompute.backward(problem, backend, statistics, upstream, wanted)
    return [x.new_empty(0) if y is None else y for x, y in zip(student, found, strict=True)]


def _token_loss_backward_fake(student: list[Tensor], teacher: list[Tensor], *rest: Any) -> list[Tensor]:
    *_, text, _statistics, _upstream, wanted = rest
    s, t, _ = packing.unpack(text, student, teacher)
    return empty_gradients(student, wanted, accumulator_dtype(s, t))


def _token_stats(student: list[Tensor], teacher: list[Tensor], *rest: Any) -> Tensor:
    *rowwise, text = rest
    problem, backend = problem_of(student, teacher, rowwise, text)
    return spread(problem, chunk_store.token_stats(problem, backend))


def _token_stats_fake(student: list[Tensor], teacher: list[Tensor], *rest: Any) -> Tensor:
    return student[0].new_empty((student[0].shape[0], len(STATS)), dtype=torch.float32)


def refuse_second_derivative() -> None:
    """PyTorch's `once_differentiable` lets it pass as zero if the upstream gradient is a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "opsd_kernels.loss: there is no second derivative; got backward with create_graph=True"
        )


IMPLEMENTATIONS = {
    "weighted_sum": (_weighted_sum, _weighted_sum_fake),
    "token_loss": (_token_loss, _token_loss_fake),
    "token_loss_backward": (_token_loss_backward, _token_loss_backward_fake),
    "token_stats": (_token_stats, _token_stats_fake),
}


def implement(functions: dict[str, tuple[Any, Any]]) -> None:
    """Gives operators their implementation and their fake."""
    for name, (function, fake) in functions.items():
        # Some have no gradient: what they call must not record one.
        library.impl(name, torch.no_grad()(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"opsd_kernels::{name}", fake, lib=library)


implement(IMPLEMENTATIONS)
torch.library.register_autograd(
    "opsd_kernels::weighted_sum", _weighted_sum_backward, setup_context=_save_weighted_sum, lib=library
)
torch.library.register_autograd(
    "opsd_kernels::token_loss", _token_loss_backward_formula, setup_context=_save_token_loss, lib=library
)

"""The definition of what a recipe of several terms is made of: `engine/composite.py` with full logits."""

from dataclasses import replace

import torch
from torch import Tensor

from opsd_kernels.backends import reference
from opsd_kernels.engine.composite_chunk import Gathered, Values
from opsd_kernels.engine.parts import Dense, Gather, Parts, widths
from opsd_kernels.engine.problem import Problem
from opsd_kernels.engine.teachers import several
from opsd_kernels.objectives import Support


def values(problem: Problem, counts: Tensor) -> Values:
    """Divergences and gathered log-probs of all N rows, 0 at dead ones, differentiable by the student.

    `counts` `[N, D]` bool says where a divergence has a weight: elsewhere it is 0, its teacher may be NaN.
    """
    parts = problem.options.parts or Parts()
    dense = []
    for index, part in enumerate(parts.dense):
        here = problem if part.constant else _only(problem, counts[:, index])
        dense.append(here.scatter(_dense(here, part)))
    none = torch.zeros(problem.total_rows, 0, **problem.like)
    return Values(
        torch.stack(dense, 1) if dense else none, [_gathered(problem, part) for part in parts.gathers]
    )


def _only(problem: Problem, counts: Tensor) -> Problem:
    """The problem of those live rows that count, `[N]` bool."""
    rows = torch.arange(problem.total_rows, device=problem.device) if problem.rows is None else problem.rows
    keep = counts[rows]
    given = None if problem.support_ids is None else problem.support_ids[keep]
    return replace(problem, rows=rows[keep], weight=problem.weight[keep], support_ids=given)


def _dense(problem: Problem, part: Dense) -> Tensor:
    if part.objective is None:
        ls, _ = reference.log_probs(replace(problem, teacher=problem.student))
        return (ls.exp() * ls.clamp(min=torch.finfo(ls.dtype).min)).sum(-1)
    options = replace(problem.options, objective=part.objective, parts=None)
    return reference.token_loss(replace(_beside(problem, part.teacher), options=options))


def _gathered(problem: Problem, part: Gather) -> Gathered:
    ls, lt = reference.log_probs(_beside(problem, part.teacher))
    if part.support is None:
        assert problem.token_ids is not None
        ids = problem.token_ids[:, None]
        valid = torch.ones_like(ids, dtype=torch.bool)
    else:
        ids, valid = _entries(_beside(problem, part.teacher), part.support, ls, lt)
    log_s, log_t = (problem.scatter(x.gather(1, ids).double()) for x in (ls, lt))
    spread = problem.scatter(ids), problem.scatter(valid)
    return Gathered(*spread, log_s, None if part.teacher is None else log_t)


def _entries(problem: Problem, support: Support, ls: Tensor, lt: Tensor) -> tuple[Tensor, Tensor]:
    """Columns `[n, K]` of a support in ascending order, and which of them are entries."""
    inside = reference.entries(ls, lt, support, reference.known_entries(problem, support))
    given = 0 if problem.support_ids is None else problem.support_ids.shape[1]
    (count,) = widths(Parts(gathers=(Gather(support),)), ls.shape[1], given)
    order = torch.argsort(inside.to(torch.int8), dim=1, descending=True, stable=True)
    ids = order[:, :count]
    return ids, inside.gather(1, ids)


def _beside(problem: Problem, teacher: int | None) -> Problem:
    """The problem with one of its teachers, or for no teacher the student in its place."""
    chosen = problem.student if teacher is None else several(problem.teacher)[teacher]
    return replace(problem, teacher=chosen)

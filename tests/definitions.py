"""What a loss means, written from the mathematics over whole rows: for tests to compare with.

It shares no code with the package, its own reference backend included. In fp64 it is the truth, in fp32 the
yardstick of `opsd_kernels.testing.assert_accurate`: what a trainer would write. Gradients are autograd's.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import (
    Hidden,
    Logits,
    LogLinear,
    Mixture,
    Objective,
    Support,
    divergences,
    get_objective,
    loss,
)
from opsd_kernels.testing import Case, Outcome, assert_accurate, evaluate

INF = math.inf


def logits(source: Any, keep: Tensor, vocab: int | None, dtype: torch.dtype) -> Tensor:
    """`[n, V]` logits at the tokens `keep` (bool, shape of the token dimensions)."""
    if isinstance(source, Logits):
        return source.z[keep].to(dtype)[:, :vocab]
    z = source.hidden[keep].to(dtype) @ source.weight.to(dtype).T
    if source.bias is not None:
        z = z + source.bias.to(dtype)
    z = z * source.logit_scale
    if source.softcap is not None:
        z = source.softcap * torch.tanh(z / source.softcap)
    return z[:, :vocab]


def log_probs(source: Any, keep: Tensor, vocab: int | None, temperature: float, dtype: torch.dtype) -> Tensor:
    """`[n, V]` log-probabilities of a student or of any teacher."""
    if isinstance(source, Hidden | Logits):
        return torch.log_softmax(logits(source, keep, vocab, dtype) / temperature, -1)
    if isinstance(source, LogLinear):
        total, excluded = 0.0, False
        for factor, stream in source.streams:
            z = logits(stream, keep, vocab, dtype)
            excluded = excluded | (z == -INF)
            total = total + _per_token(factor, keep, dtype) * z.masked_fill(z == -INF, 0)
        return torch.log_softmax(total.masked_fill(excluded, -INF) / temperature, -1)
    if isinstance(source, Mixture):
        total = 0.0
        for factor, stream in source.streams:
            p = log_probs(stream, keep, vocab, temperature, dtype).exp()
            total = total + _per_token(factor, keep, dtype) * p
        return total.log()
    # Routed: every source by itself at its own tokens.
    index = source.index[keep]
    found = torch.full((index.numel(), vocab or source.vocab), math.nan, dtype=dtype)
    for number, part in enumerate(source.sources):
        here = torch.zeros_like(keep).masked_scatter(keep, index == number)
        found[index == number] = log_probs(part, here, vocab, temperature, dtype)
    return found


def _per_token(factor: float | Tensor, keep: Tensor, dtype: torch.dtype) -> float | Tensor:
    return factor[keep].to(dtype)[:, None] if isinstance(factor, Tensor) else factor


def objective_of(divergence: str, beta: float, **options: Any) -> Objective:
    """The objective; with a beta of 1/2 where the formula has none or is not defined at that end."""
    undefined = {"skew_forward": (1,), "skew_reverse": (0,), "skew_reverse_sg": (0,), "alpha": (0, 1)}
    fixed = beta in undefined.get(divergence, ()) or not divergences.table()[divergence].uses_beta
    return Objective(divergence, 0.5 if fixed else beta, **options)


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p is 0."""
    zero = log_p == -INF
    kept_p, kept_q = log_p.masked_fill(zero, 0.0), log_q.masked_fill(zero, 0.0)
    return torch.where(zero, 0.0, kept_p.exp() * (kept_p - kept_q))


def terms(ls: Tensor, lt: Tensor, objective: Objective) -> Tensor:
    """Signed terms of the divergence."""
    if objective.divergence == "forward_kl":
        return kl_terms(lt, ls)
    if objective.divergence == "reverse_kl":
        return kl_terms(ls, lt)
    if objective.divergence == "reverse_kl_sg":
        zero = ls == -INF
        ls, lt = ls.masked_fill(zero, 0.0), lt.masked_fill(zero, 0.0)
        return torch.where(zero, 0.0, ls.exp() * (ls.detach() - lt))
    nothing = (ls == -INF) & (lt == -INF)
    ls, lt = ls.masked_fill(nothing, 0.0), lt.masked_fill(nothing, 0.0)
    return torch.where(nothing, 0.0, _two_sided_terms(ls, lt, objective.divergence, objective.beta))


def _two_sided_terms(ls: Tensor, lt: Tensor, name: str, beta: float) -> Tensor:
    s, t = ls.exp(), lt.exp()
    if name == "total_variation":
        return (s - t).abs() / 2
    if name == "alpha":
        return (beta * t + (1 - beta) * s - t**beta * s ** (1 - beta)) / (beta * (1 - beta))
    if name == "mixed":
        return beta * kl_terms(ls, lt) + (1 - beta) * kl_terms(lt, ls)
    lm = (beta * t + (1 - beta) * (s.detach() if name == "skew_reverse_sg" else s)).log()
    return {
        "jsd": beta * kl_terms(lt, lm) + (1 - beta) * kl_terms(ls, lm),
        "skew_forward": kl_terms(lt, lm),
        "skew_reverse": kl_terms(ls, lm),
        "skew_reverse_sg": kl_terms(ls, lm),
    }[name]


def chosen(ls: Tensor, lt: Tensor, support: Support, given: Tensor | None) -> Tensor:
    """`[n, V]` bool, dense: the entries of the support."""
    if given is not None:
        return (given[:, :, None] == torch.arange(ls.shape[1])).any(1)
    rank_s, rank_t = (x.argsort(1, descending=True).argsort(1) for x in (ls, lt))
    student, teacher = rank_s < support.k, rank_t < support.k
    return {
        "student": student,
        "teacher": teacher,
        "union": student | teacher,
        "intersection": student & teacher,
    }[support.of]


def on_support(log_p: Tensor, inside: Tensor, rest: str) -> Tensor:
    """The distribution as the loss sees it: `[n, V]`, or `[n, V + 1]` with the mass of all others."""
    kept = log_p.masked_fill(~inside, -INF)
    if rest == "drop":
        return kept
    # Where there is nothing to sum a 1 stands in, so that its logarithm has a gradient.
    p = log_p.exp()
    if rest == "renormalise":
        mass = p.masked_fill(~inside, 0.0).sum(1, keepdim=True)
        return kept - torch.where(mass > 0, mass, 1.0).log()
    # The sum of what is outside, which is 1 - mass of what is inside without the cancellation.
    mass = p.masked_fill(inside, 0.0).sum(1, keepdim=True)
    return torch.cat((kept, torch.where(mass > 0, torch.where(mass > 0, mass, 1.0).log(), -INF)), 1)


def on_support_of_both(ls: Tensor, lt: Tensor, inside: Tensor, rest: str) -> tuple[Tensor, Tensor]:
    """Student's and teacher's, as the loss sees them."""
    if rest == "renormalise_teacher":
        return on_support(ls, inside, "drop"), on_support(lt, inside, "renormalise")
    return on_support(ls, inside, rest), on_support(lt, inside, rest)


def clipped(x: Tensor, bound: float | None, mode: str) -> Tensor:
    """min(x, bound); above the bound no gradient, or the gradient times bound / x."""
    if bound is None:
        return x
    if mode == "zero":
        return torch.where(x > bound, bound, x)
    return x * torch.where(x > bound, bound / x, 1.0).detach()


def log_bounded(ls: Tensor, lt: Tensor, bound: float) -> Tensor:
    """log of t' ~ s min(max(t / s, e^-bound), e^bound), s detached."""
    s = ls.detach()
    ratio = torch.where(s == -INF, 0.0, lt - torch.where(s == -INF, 0.0, s)).clamp(-bound, bound)
    return torch.log_softmax(s + ratio, dim=1)


def entry_terms(ls: Tensor, lt: Tensor, objective: Objective, given: Tensor | None = None) -> Tensor:
    """Signed terms, before any clip, over what the objective's support leaves."""
    if objective.support is not None:
        inside = chosen(ls, lt, objective.support, given)
        ls, lt = on_support_of_both(ls, lt, inside, objective.support.rest)
    return terms(ls, lt, objective)


def token_losses(ls: Tensor, lt: Tensor, objective: Objective, given: Tensor | None = None) -> Tensor:
    """`[n]` token losses."""
    if objective.ratio_bound is not None:
        bounded = log_bounded(ls, lt, objective.ratio_bound)
        return clipped(entry_terms(ls, bounded, objective, given).sum(1), objective.token_clip, "scale")
    entries = clipped(entry_terms(ls, lt, objective, given), objective.entry_clip, objective.clip_mode)
    return clipped(entries.sum(1), objective.token_clip, objective.clip_mode)


def define(
    student: Any,
    teacher: Any,
    *,
    dtype: torch.dtype = torch.float64,
    objective: str | Objective = "forward_kl",
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    token_weight: Tensor | None = None,
    support_ids: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    denominator: float | None = None,
    vocab_size: int | None = None,
    **unused: Any,
) -> Tensor:
    """`opsd_kernels.loss`, as defined."""
    keep = torch.ones(student.lead, dtype=torch.bool) if mask is None else mask
    if rows is not None:
        keep = torch.zeros(student.lead.numel(), dtype=torch.bool).index_fill(0, rows.long(), True)
        keep = keep.reshape(student.lead)
    ls = log_probs(student, keep, vocab_size, temperature, dtype)
    with torch.no_grad():
        lt = log_probs(teacher, keep, vocab_size, temperature, dtype)
    given = None if support_ids is None else support_ids[keep]
    tokens = token_losses(ls, lt, get_objective(objective), given)
    if token_weight is not None:
        tokens = tokens * token_weight[keep].to(dtype)
    if reduction == "none":
        return torch.zeros(student.lead, dtype=dtype).masked_scatter(keep, tokens)
    return tokens.sum() / ((denominator or max(int(keep.sum()), 1)) if reduction == "mean" else 1)


def exactly(case: Case, upstream: Tensor | None = None) -> Outcome:
    """Value and gradients of the definition in fp64."""
    student = case.student.with_tensors([x.double() for x in case.student.tensors])
    return evaluate(define, replace(case, student=student), upstream)


def assert_as_defined(case: Case, *, backend: str = "torch", allowance: float = 1.0) -> Outcome:
    """Value and every gradient by the one tolerance rule; returns what the backend computed.

    Args:
        case: the call, in the dtypes to be tested.
        backend: that is tested.
        allowance: factor of eager's error before it is the yardstick.
    """
    in_fp32 = partial(define, dtype=torch.float32)
    reduced = case.options.get("reduction", "mean") != "none"
    lead = () if reduced else case.student.lead
    # Of both signs, and another one for every token.
    upstream = (torch.arange(math.prod(lead)) % 5 - 1.5).reshape(lead)
    actual = evaluate(partial(loss, backend=backend), case, upstream)
    expected, eager = exactly(case, upstream), evaluate(in_fp32, case, upstream)
    value = eager.loss
    if reduced:
        # Errors of tokens that cancel in eager's sum are luck and no yardstick.
        tokens = case.having(reduction="none", denominator=None)
        errors = evaluate(in_fp32, tokens).loss - exactly(tokens).loss
        total = exactly(case.having(reduction="sum", denominator=None)).loss
        value = expected.loss + (errors.abs().sum() * expected.loss / total if total else 0.0)
    assert_accurate("loss", actual.loss, expected.loss, _times_error(value, expected.loss, allowance))
    for name, gradient in expected.gradients.items():
        yardstick = _times_error(eager.gradients[name], gradient, allowance)
        assert_accurate(f"d{name}", actual.gradients[name], gradient, yardstick)
    return actual


def _times_error(eager: Tensor, truth: Tensor, factor: float) -> Tensor:
    return truth + factor * (eager - truth)

"""The definition of every loss and statistic, in plain PyTorch with autograd's gradient.

Written for reading and for tests: it holds `[N, V]` logits and shares no formula with the other backends.
It computes in fp64 if an input is fp64, in fp32 otherwise.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from opsd_kernels.engine.problem import Problem
from opsd_kernels.objectives import Objective, Support
from opsd_kernels.sources import Hidden, Logits, LogLinear, Mixture, Routed, Source, Target, Teacher, TopK
from opsd_kernels.targets import target


def token_loss(problem: Problem) -> Tensor:
    """`[n]` loss of every live row, differentiable with respect to the student's tensors."""
    return _clipped_sum(_terms_on_support(problem), problem.objective)


def token_stats(problem: Problem) -> dict[str, Tensor]:
    """`[n]` values of every field of `TokenStats`."""
    ls, lt = log_probs(problem)
    if problem.token_ids is None:
        student_logprob = teacher_logprob = torch.full_like(ls[:, 0], torch.nan)
    else:
        student_logprob, teacher_logprob = (x.gather(-1, problem.token_ids[:, None])[:, 0] for x in (ls, lt))
    return {
        "forward_kl": _terms(ls, lt, Objective("forward_kl")).sum(-1),
        "reverse_kl": _terms(ls, lt, Objective("reverse_kl")).sum(-1),
        "jsd": _terms(ls, lt, Objective("jsd", beta=0.5)).sum(-1),
        "student_entropy": -(ls.exp() * _finite(ls)).sum(-1),
        "teacher_entropy": -(lt.exp() * _finite(lt)).sum(-1),
        "student_logprob": student_logprob,
        "teacher_logprob": teacher_logprob,
        "top1_agreement": (ls.argmax(-1) == lt.argmax(-1)).to(ls.dtype),
        "clipped_fraction": _clipped_fraction(problem),
        "dropped_share": torch.zeros_like(ls[:, 0]),
    }


def logits(source: Source, rows: Tensor | None = None) -> Tensor:
    """`[n, V]` logits of a source at `rows` (None for all), in fp32 or fp64."""
    double = any(x.dtype == torch.float64 for x in source.tensors)
    dtype = torch.float64 if double else torch.float32
    # Rows are selected first: a NaN in a dead row must not reach dW as 0 * NaN.
    first = source.tensors[0].to(dtype) if rows is None else source.tensors[0][rows].to(dtype)
    if not isinstance(source, Hidden):
        return first
    bias = None if source.bias is None else source.bias.to(dtype)
    with torch.autocast(first.device.type, enabled=False):
        z = F.linear(first, source.weight.to(dtype), bias) * source.logit_scale
    return z if source.softcap is None else source.softcap * torch.tanh(z / source.softcap)


def teacher_log_probs(source: Teacher, rows: Tensor | None, temperature: float) -> Tensor:
    """`[n, V]` log-probabilities of a teacher, whatever it is made of."""
    if isinstance(source, Hidden | Logits):
        return F.log_softmax(logits(source, rows) / temperature, dim=-1)
    if isinstance(source, LogLinear):
        streams = [_factor(a, rows) * logits(stream, rows) for a, stream in source.streams]
        excluded = torch.stack([logits(stream, rows) == -torch.inf for _, stream in source.streams]).any(0)
        z = torch.stack(streams).sum(0).masked_fill(excluded, -torch.inf)
        return F.log_softmax(z / temperature, dim=-1)
    if isinstance(source, Mixture):
        parts = [_factor(w, rows) * teacher_log_probs(x, rows, temperature).exp() for w, x in source.streams]
        return torch.stack(parts).sum(0).log()
    assert isinstance(source, Routed)
    choice = source.index if rows is None else source.index[rows]
    parts = [teacher_log_probs(x, rows, temperature) for x in source.sources]
    return torch.stack(parts)[choice.long(), torch.arange(choice.numel(), device=choice.device)]


def _built(source: Target, problem: Problem, ls: Tensor) -> Tensor:
    """A target is what its function says; only that it sees log-probabilities, not logits, is different."""
    with torch.no_grad():
        parts = [teacher_log_probs(x, problem.rows, problem.temperature) for x in source.sources]
        of_parts = [x.clone().to(ls.dtype) for x in parts]
        z = target[source.build](ls.clone(), *of_parts, **source.options)
        return F.log_softmax(z, dim=-1)


def _known_entries(source: TopK, problem: Problem) -> Tensor:
    """The log-probabilities that are known; each other entry has an equal part of the mass that is left."""
    ids, log_p = (x if problem.rows is None else x[problem.rows] for x in (source.ids, source.logprobs))
    found = torch.full((len(ids), problem.vocab), torch.nan, dtype=problem.dtype, device=problem.device)
    for row, entries_of_row, values in zip(found, ids, log_p, strict=True):
        known = entries_of_row[entries_of_row >= 0]
        given = values[entries_of_row >= 0].to(problem.dtype)
        row.fill_(max(0.0, 1 - float(given.exp().sum())) / max(1, problem.vocab - len(known)))
        row.log_()
        row[known] = given
    return found


def _factor(factor: float | Tensor, rows: Tensor | None) -> float | Tensor:
    if not isinstance(factor, Tensor):
        return factor
    return (factor if rows is None else factor[rows])[:, None]


def log_probs(problem: Problem) -> tuple[Tensor, Tensor]:
    """`[n, V]` log-probabilities of student and teacher; the teacher's are constant."""
    z_s = logits(problem.student, problem.rows)
    ls = F.log_softmax(z_s.to(problem.dtype) / problem.temperature, dim=-1)
    teacher = problem.teacher
    if isinstance(teacher, Target):
        lt = _built(teacher, problem, ls)
    elif isinstance(teacher, TopK):
        lt = _known_entries(teacher, problem)
    else:
        lt = teacher_log_probs(teacher, problem.rows, problem.temperature)
    # A tensor of inference_mode cannot be saved, hence the clone.
    lt = lt.detach().clone()
    return ls, lt.to(problem.dtype)


def _terms_on_support(problem: Problem) -> Tensor:
    """`[n, entries]` signed terms over the objective's support, of a teacher that is bounded already."""
    ls, lt = log_probs(problem)
    if problem.objective.ratio_bound is not None:
        lt = _bounded(ls, lt, problem.objective.ratio_bound)
    support = problem.objective.support
    if support is None:
        return _terms(ls, lt, problem.objective)
    inside = entries(ls, lt, support, known_entries(problem, support))
    if not support.is_whole:
        if support.rest == "renormalise_teacher":
            lt = torch.where(inside, _renormalised(lt, inside), lt)  # outside anything finite will do
        return torch.where(inside, _terms(ls, lt, problem.objective), 0.0)
    if support.rest == "renormalise":
        ls, lt = _renormalised(ls, inside), _renormalised(lt, inside)
    else:
        ls, lt = _with_tail(ls, inside), _with_tail(lt, inside)
    return _terms(ls, lt, problem.objective)


def _bounded(ls: Tensor, lt: Tensor, bound: float) -> Tensor:
    """The teacher whose probabilities are between e^-bound and e^bound times the student's, renormalised."""
    s, t = ls.detach().exp(), lt.exp()
    t = torch.minimum(torch.maximum(t, s * math.exp(-bound)), s * math.exp(bound))
    return (t / t.sum(-1, keepdim=True)).log()


def known_entries(problem: Problem, support: Support) -> Tensor | None:
    """`[n, K]` ids of a support that is given, or those among which a TopK teacher's most likely are."""
    if support.of == "given":
        return problem.support_ids
    if support.of != "teacher" or not isinstance(problem.teacher, TopK):
        return None
    return problem.teacher.ids if problem.rows is None else problem.teacher.ids[problem.rows]


def entries(ls: Tensor, lt: Tensor, support: Support, given: Tensor | None) -> Tensor:
    """`[n, V]` bool: the entries of the support."""

    def of(ids: Tensor) -> Tensor:
        padded = F.pad(torch.zeros_like(ls, dtype=torch.bool), (1, 0))
        return padded.scatter(1, ids + 1, True)[:, 1:]

    if support.of == "given":
        assert given is not None
        return of(given)
    assert support.k is not None
    k = min(support.k, ls.shape[1])
    if given is not None:
        lt = torch.where(of(given), lt, -torch.inf)
    # What a side excludes is not among its most likely entries, however few there are.
    student, teacher = (of(x.topk(k, dim=1).indices) & (x > -torch.inf) for x in (ls, lt))
    chosen = {
        "student": student,
        "teacher": teacher,
        "union": student | teacher,
        "intersection": student & teacher,
    }
    return chosen[support.of]


def _renormalised(log_p: Tensor, inside: Tensor) -> Tensor:
    some = inside.any(1, keepdim=True)
    kept = torch.where(inside, log_p, -torch.inf)
    kept = torch.where(some, kept, 0.0)  # keeps the branch that is not taken finite
    return torch.where(some & inside, kept - kept.logsumexp(1, keepdim=True), -torch.inf)


def _with_tail(log_p: Tensor, inside: Tensor) -> Tensor:
    """Log-probabilities inside, and the log of all other mass as a last column."""
    outside = torch.where(inside, -torch.inf, log_p)
    mass = (outside != -torch.inf).any(1, keepdim=True)
    tail = torch.where(mass, outside, 0.0).logsumexp(1, keepdim=True)
    return torch.cat((torch.where(inside, log_p, -torch.inf), torch.where(mass, tail, -torch.inf)), 1)


def _terms(ls: Tensor, lt: Tensor, objective: Objective) -> Tensor:
    """`[n, V]` signed terms l_v as published."""
    name, beta = objective.divergence, objective.beta
    if name == "forward_kl" or (beta == 0 and name in ("jsd", "skew_forward", "mixed")):
        return _kl(lt, ls)
    if name == "reverse_kl" or (beta == 1 and name in ("jsd", "skew_reverse", "skew_reverse_sg", "mixed")):
        return _kl(ls, lt)
    if name == "reverse_kl_sg":
        kept = _kl(ls, lt).detach()
        # s (sg[log s] - log t) varies with s alone: d/d log s is the term itself.
        return kept * (1 + _finite(ls) - _finite(ls).detach())
    if name == "jsd":
        lm = _log_mixture(ls, lt, beta)
        return beta * _kl(lt, lm) + (1 - beta) * _kl(ls, lm)
    if name == "skew_forward":
        return _kl(lt, _log_mixture(ls, lt, beta))
    if name == "skew_reverse":
        return _kl(ls, _log_mixture(ls, lt, beta))
    if name == "skew_reverse_sg":
        return _kl(ls, _log_mixture(ls.detach(), lt, beta))
    if name == "total_variation":
        return (ls.exp() - lt.exp()).abs() / 2
    if name == "alpha":
        product = (beta * _finite(lt) + (1 - beta) * _finite(ls)).exp()
        return (beta * lt.exp() + (1 - beta) * ls.exp() - product) / (beta * (1 - beta))
    if name == "mixed":
        return beta * _kl(ls, lt) + (1 - beta) * _kl(lt, ls)
    raise ValueError(f"objective: the reference has no definition of {name!r}")


def _log_mixture(ls: Tensor, lt: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(_finite(lt) + math.log(beta), _finite(ls) + math.log(1 - beta))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p = 0; the branch not taken is kept finite: its gradient is 0, not NaN."""
    outside = log_p == -torch.inf
    difference = torch.where(outside, 0.0, log_p) - torch.where(outside, 0.0, log_q)
    return log_p.exp() * difference


def _clipped_sum(terms: Tensor, objective: Objective) -> Tensor:
    if objective.ratio_bound is not None:
        return _clip(terms.sum(-1), objective.token_clip, "scale")
    token = _clip(terms, objective.entry_clip, objective.clip_mode).sum(-1)
    return _clip(token, objective.token_clip, objective.clip_mode)


def _clip(x: Tensor, bound: float | None, mode: str) -> Tensor:
    if bound is None:
        return x
    if mode == "zero":
        return x.clamp(max=bound)
    scaled = x * torch.where(x > bound, bound / x, 1.0).detach()
    return torch.where(x == torch.inf, bound, scaled)


def _clipped_fraction(problem: Problem) -> Tensor:
    """Share of the divergence that its clips remove, or of its positive terms where it is of a part only."""
    objective = problem.objective
    bare = replace(objective, entry_clip=None, token_clip=None, clip_mode="zero")
    terms = _terms_on_support(replace(problem, options=replace(problem.options, objective=bare)))
    if objective.support is None or objective.support.is_whole:
        whole, left = terms.sum(-1), token_loss(problem)
        # An unclipped loss is the same sum, but for rounding of a target's renormalisation.
        return torch.where(left < whole, 1 - left / whole, 0.0)
    positive = terms.clamp(min=0)
    lost = positive.sum(-1) - _clip(positive, objective.entry_clip, "zero").sum(-1)
    entries_left = 1 - torch.where(lost > 0, lost / positive.sum(-1), 0.0)
    token = _clip(terms, objective.entry_clip, "zero").sum(-1)
    return 1 - entries_left * torch.where(token > 0, _clip(token, objective.token_clip, "zero") / token, 1.0)


def _finite(log_p: Tensor) -> Tensor:
    """log p with -inf replaced by the lowest finite number: p is 0 there."""
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)

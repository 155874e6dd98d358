"""The definition of every loss and statistic, in plain PyTorch with autograd's gradient.

Written for reading and for tests: it holds `[N, V]` logits and shares no formula with the other backends.
It computes in fp64 if an input is fp64, in fp32 otherwise.
"""

import math

import torch
import torch.nn.functional as F

from opsd_kernels.engine.problem import Problem
from opsd_kernels.objectives import Objective
from opsd_kernels.sources import Hidden, Source


def token_loss(problem: Problem) -> torch.Tensor:
    """`[n]` loss of every live row, differentiable with respect to the student's tensors."""
    ls, lt = _log_probs(problem)
    return _clipped_sum(_terms(ls, lt, problem.objective), problem.objective)


def token_stats(problem: Problem, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """`[n]` values of every field of `TokenStats`, for `token_ids` `[n]` of the live rows."""
    ls, lt = _log_probs(problem)
    terms = _terms(ls, lt, problem.objective)
    return {
        "forward_kl": _terms(ls, lt, Objective("forward_kl")).sum(-1),
        "reverse_kl": _terms(ls, lt, Objective("reverse_kl")).sum(-1),
        "jsd": _terms(ls, lt, Objective("jsd", beta=0.5)).sum(-1),
        "student_entropy": -(ls.exp() * _finite(ls)).sum(-1),
        "teacher_entropy": -(lt.exp() * _finite(lt)).sum(-1),
        "student_logprob": ls.gather(-1, token_ids[:, None])[:, 0],
        "teacher_logprob": lt.gather(-1, token_ids[:, None])[:, 0],
        "top1_agreement": (ls.argmax(-1) == lt.argmax(-1)).to(ls.dtype),
        "clipped_fraction": _clipped_fraction(terms, problem.objective),
    }


def logits(source: Source, rows: torch.Tensor | None = None) -> torch.Tensor:
    """`[n, V]` logits of a source at `rows` (None for all), in fp32 or fp64."""
    tensors = [x for x in source.tensors if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    # Rows are selected first: a NaN in a dead row must not reach dW as 0 * NaN.
    first = tensors[0].to(dtype) if rows is None else tensors[0][rows].to(dtype)
    if not isinstance(source, Hidden):
        return first
    bias = None if source.bias is None else source.bias.to(dtype)
    with torch.autocast(first.device.type, enabled=False):
        z = F.linear(first, source.weight.to(dtype), bias) * source.logit_scale
    return z if source.softcap is None else source.softcap * torch.tanh(z / source.softcap)


def _log_probs(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    z_s = logits(problem.student, problem.rows)
    z_t = logits(problem.teacher, problem.rows).detach().clone()  # a tensor of inference_mode cannot be saved
    dtype = torch.promote_types(z_s.dtype, z_t.dtype)
    return tuple(F.log_softmax(z.to(dtype) / problem.temperature, dim=-1) for z in (z_s, z_t))  # type: ignore[return-value]


def _terms(ls: torch.Tensor, lt: torch.Tensor, objective: Objective) -> torch.Tensor:
    """`[n, V]` signed terms l_v as published."""
    if objective.divergence == "forward_kl" or (objective.divergence == "jsd" and objective.beta == 0):
        return _kl(lt, ls)
    if objective.divergence == "reverse_kl" or (objective.divergence == "jsd" and objective.beta == 1):
        return _kl(ls, lt)
    if objective.divergence == "jsd":
        beta = objective.beta
        lm = torch.logaddexp(_finite(lt) + math.log(beta), _finite(ls) + math.log(1 - beta))
        return beta * _kl(lt, lm) + (1 - beta) * _kl(ls, lm)
    raise ValueError(f"objective: the reference has no definition of {objective.divergence!r}")


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """p (log p - log q), 0 where p = 0; the branch not taken is kept finite: its gradient is 0, not NaN."""
    outside = log_p == -torch.inf
    difference = torch.where(outside, 0.0, log_p) - torch.where(outside, 0.0, log_q)
    return log_p.exp() * difference


def _clipped_sum(terms: torch.Tensor, objective: Objective) -> torch.Tensor:
    token = _clip(terms, objective.entry_clip, objective.clip_mode).sum(-1)
    return _clip(token, objective.token_clip, objective.clip_mode)


def _clip(x: torch.Tensor, bound: float | None, mode: str) -> torch.Tensor:
    if bound is None:
        return x
    if mode == "zero":
        return x.clamp(max=bound)
    scaled = x * torch.where(x > bound, bound / x, 1.0).detach()
    return torch.where(x == torch.inf, bound, scaled)


def _clipped_fraction(terms: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Share of the positive terms' sum that `entry_clip` removes, then of the loss by `token_clip`."""
    kept = torch.ones_like(terms[:, 0])
    if objective.entry_clip is not None:
        positive = terms.clamp(min=0)
        total = positive.sum(-1)
        kept = torch.where(total > 0, positive.clamp(max=objective.entry_clip).sum(-1) / total, 1.0)
    if objective.token_clip is not None:
        token = _clip(terms, objective.entry_clip, objective.clip_mode).sum(-1)
        kept = torch.where(token > objective.token_clip, kept * objective.token_clip / token, kept)
    return 1 - kept


def _finite(log_p: torch.Tensor) -> torch.Tensor:
    """log p with -inf replaced by the lowest finite number: p is 0 there."""
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)

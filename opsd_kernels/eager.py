"""The loss in eager PyTorch, as a trainer writes it: what the engine's errors are compared with."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opsd_kernels.objectives import Objective, get_objective
from opsd_kernels.sources import Hidden, Source


def eager_loss(
    student: Source,
    teacher: Source,
    *,
    objective: str | Objective = "forward_kl",
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    vocab_size: int | None = None,
    **unused: Any,
) -> Tensor:
    """The loss as a trainer writes it: logits in the inputs' dtype, then fp32 (fp64 stays), then autograd.

    As in trainers, columns of -inf and NaN in masked rows are not looked after.
    """
    ls = _eager_log_probs(student, vocab_size, temperature)
    lt = _eager_log_probs(teacher, vocab_size, temperature).detach()
    chosen = get_objective(objective)
    if chosen.ratio_bound is not None:
        c, d = chosen.ratio_bound, ls.detach()
        lt, chosen = F.log_softmax(d + (lt - d).clamp(-c, c), dim=-1), chosen.of_rows
    token = _eager_clip(_eager_terms(ls, lt, chosen), chosen.entry_clip, chosen.clip_mode).sum(-1)
    token = _eager_clip(token, chosen.token_clip, chosen.clip_mode)
    keep = torch.ones_like(token) if mask is None else mask.to(token)
    count = keep.sum() if denominator is None else denominator
    if token_weight is not None:
        keep = keep * token_weight.to(token)
    weighted = token * keep
    if reduction == "none":
        return weighted
    return weighted.sum() / count if reduction == "mean" else weighted.sum()


def _eager_log_probs(source: Source, vocab_size: int | None, temperature: float) -> Tensor:
    if isinstance(source, Hidden):
        dtype = torch.promote_types(source.hidden.dtype, source.weight.dtype)
        bias = None if source.bias is None else source.bias.to(dtype)
        z = F.linear(source.hidden.to(dtype), source.weight.to(dtype), bias) * source.logit_scale
        z = z if source.softcap is None else source.softcap * torch.tanh(z / source.softcap)
    else:
        z = source.z
    z = z[..., :vocab_size].to(torch.promote_types(z.dtype, torch.float32))
    return F.log_softmax(z if temperature == 1 else z / temperature, dim=-1)


def _eager_terms(ls: Tensor, lt: Tensor, objective: Objective) -> Tensor:
    kl = partial(F.kl_div, reduction="none", log_target=True)  # kl(log q, log p) = p (log p - log q)
    name, beta = objective.divergence, objective.beta
    if name == "forward_kl" or (name in ("jsd", "skew_forward") and beta == 0):
        return kl(ls, lt)
    if name == "reverse_kl" or (name != "alpha" and beta == 1):
        return kl(lt, ls)
    if name == "reverse_kl_sg":
        return ls.exp() * (ls.detach() - lt)
    if name == "total_variation":
        return (ls.exp() - lt.exp()).abs() / 2
    if name == "alpha":
        s, t = ls.exp(), lt.exp()
        return (beta * t + (1 - beta) * s - t**beta * s ** (1 - beta)) / (beta * (1 - beta))
    if name == "mixed":
        return beta * kl(lt, ls) + (1 - beta) * kl(ls, lt)
    inside = ls.detach() if name == "skew_reverse_sg" else ls
    lm = torch.logaddexp(lt + math.log(beta), inside + math.log(1 - beta))
    if name == "skew_forward":
        return kl(lm, lt)
    return kl(lm, ls) if name != "jsd" else beta * kl(lm, lt) + (1 - beta) * kl(lm, ls)


def _eager_clip(x: Tensor, bound: float | None, mode: str) -> Tensor:
    if bound is None:
        return x
    if mode == "zero":
        return x.clamp(max=bound)
    return x * (bound / x.detach()).where(x.detach() > bound, torch.ones_like(x.detach()))

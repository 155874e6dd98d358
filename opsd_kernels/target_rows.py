"""What the targets do with rows of logits `[C, V]`, which have -inf in excluded columns."""

import math
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.checks import is_finite, shown
from opsd_kernels.engine.entries import Entries, Softmax
from opsd_kernels.objectives import Objective


def finite(x: Tensor) -> Tensor:
    """-inf becomes 0: what is taken off a row that has no columns."""
    return torch.where(x == -torch.inf, 0.0, x)


def normaliser(z: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit and log of the sum of exp(z - largest), `[C, 1]`; 0 and -inf where a row has no columns.

    The sum is in fp64, and the two parts stay apart: their sum, rounded to the size of the logits, would cost
    digits.
    """
    top = finite(z.amax(1, keepdim=True))
    total = (z - top).exp_().sum(1, keepdim=True, dtype=torch.float64)
    return top, total.log().to(z.dtype)


def log_softmax_(z: Tensor) -> Tensor:
    """log softmax(z), in place."""
    top, log_sum = normaliser(z)
    return z.sub_(top).sub_(finite(log_sum))


def entropy(z: Tensor) -> Tensor:
    """Entropy of softmax(z), nats, `[C, 1]`."""
    p = Softmax(z).p
    return torch.special.entr(p).sum(1, keepdim=True, dtype=torch.float64).to(z.dtype)


def align_(*sources: Tensor) -> Tensor:
    """Excludes from every source the columns that one of them excludes; returns them, bool `[C, V]`.

    Also takes off each row's largest logit: differences of two sources keep their digits, whatever constants
    their rows have.
    """
    gone = sources[0] == -torch.inf
    for z in sources[1:]:
        gone |= z == -torch.inf
    for z in sources:
        z.masked_fill_(gone, -torch.inf)
        z.sub_(finite(z.amax(1, keepdim=True)))
    return gone


def buckets_(z: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities `[C, K + 1]` of the entries `ids` `[C, K]` and of the rest of the row as one.

    z, whose largest logit is 0, is -inf at the entries afterwards.
    """
    inside = z.gather(1, ids)
    z.scatter_(1, ids, -torch.inf)
    top, log_sum = normaliser(z)
    return log_softmax_(torch.cat((inside, top + log_sum), 1))


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """JSD with equal weights of two rows of log-probabilities, nats, fp64 `[C, 1]`."""
    entries = Entries(Softmax(log_p), Softmax(log_q), Objective("jsd", beta=0.5))
    return entries.value.sum(1, keepdim=True, dtype=torch.float64)


def interpolate_(log_p: Tensor, log_q: Tensor, alpha: Tensor, floor: float | None) -> Tensor:
    """(1 - alpha) log p + alpha log q for alpha `[C, 1]`, in place of log_p; log_q is used up.

    Args:
        floor: least probability of either; excluded columns stay excluded.
    """
    gone = log_p == -torch.inf
    gone |= log_q == -torch.inf
    if floor is not None:
        log_p.clamp_(min=math.log(floor))
        log_q.clamp_(min=math.log(floor))
    step = log_q.sub_(log_p).masked_fill_(gone, 0.0).mul_(alpha)
    return log_p.add_(step).masked_fill_(gone, -torch.inf)


def with_student_(z: Tensor, z_s: Tensor, a: float, b: float) -> Tensor:
    """a z + b z_s, in place of z."""
    gone = z == -torch.inf
    gone |= z_s == -torch.inf
    z.sub_(finite(z.amax(1, keepdim=True))).mul_(a)
    student = (z_s - finite(z_s.amax(1, keepdim=True))).masked_fill_(gone, 0.0)
    return z.add_(student, alpha=b).masked_fill_(gone, -torch.inf)


def check_k(k: Any) -> None:
    """A number of entries, or None for all."""
    if k is not None and (type(k) is not int or k < 1):
        raise ValueError(f"k: expected an int of at least 1 or None; got {k!r}")


def check_range(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """A number in [low, high], or in (low, high]; the bounds themselves may be infinite, the value not."""
    if not is_finite(value) or not low <= value <= high or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise ValueError(f"{name}: expected a finite number in {bracket}{low}, {high}]; got {shown(value)}")

"""Several teachers, or contexts of one, over the same rollouts: the columns of data they make."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Score = Callable[[str], Tensor]


def score_pool(roles: Sequence[str], score: Score, heard: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`teacher_logprobs` [B, C, M], and `teacher_weight` [B, M] that is uniform over those heard in a row.

    A teacher that is not heard in a row has the weight 0 there and the mean log-probs of those that are,
    which moves neither a consensus nor a spread by much, whatever it said itself. A row that hears none has
    no weight at all, and the log-probs of what every one reads then.

    Args:
        roles: of the M teachers, in the order of the columns.
        score: `score(role)` gives the log-probs [B, C] of the sampled tokens under that teacher, or NaN at
            tokens that do not count.
        heard: for each role, the rows in which it knows something, [B] bool.
    """
    if not roles:
        raise ValueError("roles: expected at least one teacher; got none")
    audible = torch.stack([heard[role].bool() for role in roles], dim=1)
    said = torch.stack([score(role).detach() for role in roles], dim=2)
    counts = audible[:, None, :]
    mean = torch.where(counts, said, 0.0).sum(2, keepdim=True) / counts.sum(2, keepdim=True).clamp(min=1)
    silent = torch.where(counts.any(2, keepdim=True), mean, said)
    return {"teacher_logprobs": torch.where(counts, said, silent), "teacher_weight": uniform(audible)}


def uniform(audible: Tensor) -> Tensor:
    """The same weight for every teacher that is heard, 1 in all: [B, M] from `audible` [B, M] bool."""
    return audible.float() / audible.sum(dim=1, keepdim=True).clamp(min=1)

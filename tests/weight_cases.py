"""Batches whose dead tokens hold NaN or nonsense, and how tests of weights compare with definitions."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from opsd_kernels.options import TokenStats
from opsd_kernels.tokens import Batch

# A full row, one with holes, a single token, none, a late start, and two more.
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)
GROUP = torch.tensor([7, 7, 7, 3, 3, 3, 9])
CORRECT = torch.tensor([True, False, True, True, False, False, True])


def batch(seed: int = 0, mask: Tensor = MASK, junk: float = math.nan) -> Batch:
    """A batch in fp64 with every column of data; dead tokens hold `junk`, in statistics 1000."""
    generator = torch.Generator().manual_seed(seed)

    def column(low: float, high: float, *shape: int, fill: float = junk) -> Tensor:
        size = (*mask.shape, *shape)
        values = low + (high - low) * torch.rand(size, generator=generator, dtype=torch.float64)
        live = mask.reshape(*mask.shape, *(1 for _ in shape))
        return torch.where(live, values, fill)

    fields = [column(0, 3, fill=1000.0) for _ in range(5)]
    logprobs = [column(-6, 0, fill=1000.0) for _ in range(2)]
    stats = TokenStats(*fields, *logprobs, *(torch.zeros(mask.shape) for _ in range(3)))
    rows = len(mask)
    data = {
        "old_logprob": column(-6, 0),
        "rollout_logprob": column(-6, 0),
        "teacher_logprobs": column(-6, 0, 3),
        "teacher_weight": column(0, 1, 3),
        "confidence": 100 * torch.rand(rows, 3, generator=generator, dtype=torch.float64),
        "coefficient": column(0, 2),
        "teacher_mass": column(0, 1),
        "similarity": column(0, 10),
        "reward": torch.rand(rows, generator=generator, dtype=torch.float64).round(decimals=1),
        "correct": CORRECT[:rows],
        "privileged": torch.tensor([True, True, False, True, True, True, True])[:rows],
        "group": GROUP[:rows],
        "span": torch.where(mask, torch.arange(mask.shape[1]) % 3, -5),
        "turn": torch.where(mask, torch.arange(mask.shape[1]) // 3, 10**6),
        "chunk": torch.where(mask, torch.arange(mask.shape[1]) // 4 - 1, -9),
        "selected": torch.where(mask, torch.arange(mask.shape[1]) % 2 == 0, True),
        "negative_logprob": column(-6, 0),
        "draw": column(0, 1),
    }
    return Batch(mask, data, lambda: stats)


def by_row(b: Batch, function: Callable[..., list[float]], *columns: Tensor) -> Tensor:
    """`[B, C]` of `function(values of a row's live tokens, one list per column)`, 0 at dead tokens."""
    found = torch.zeros(b.mask.shape, dtype=torch.float64)
    for row, mask in enumerate(b.mask):
        if mask.any():
            lists = [column[row][mask].tolist() for column in columns]
            found[row][mask] = torch.tensor(function(*lists), dtype=torch.float64)
    return found


def by_token(b: Batch, function: Callable[..., float], *columns: Tensor) -> Tensor:
    """`[B, C]` of `function` of one live token's values, 0 at dead tokens."""
    return by_row(b, lambda *lists: [function(*values) for values in zip(*lists, strict=True)], *columns)


def assert_weights(found: Tensor, expected: Tensor) -> None:
    """Equal up to fp32 rounding."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-6, atol=2e-7)


def with_data(b: Batch, **data: Tensor) -> Batch:
    return replace(b, data={**b.data, **data})


def without(b: Batch, *names: str) -> Batch:
    return replace(b, data={k: v for k, v in b.data.items() if k not in names})

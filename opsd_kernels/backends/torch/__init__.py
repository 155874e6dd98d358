"""Row functions in PyTorch: from the logits of a chunk to losses, statistics and dlogits, on any device.

They walk the chunk in blocks of rows so that the dozen temporaries of a block stay in the cache of a CPU
(or in a few hundred megabytes of a GPU). All tensors are fp32, or fp64.
"""

import torch

from opsd_kernels.backends.torch.rows import (
    live_columns,
    normalisers,
    row_gradient_,
    row_loss,
    row_stats,
    slab_gradient_,
    softmax_gradient_,
)
from opsd_kernels.engine.logits_store import DenseStore as LogitsStore

__all__ = [
    "LogitsStore",
    "live_columns",
    "normalisers",
    "row_gradient_",
    "row_loss",
    "row_stats",
    "slab_gradient_",
    "softmax_gradient_",
    "unsupported",
]


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: PyTorch runs everywhere."""
    return None

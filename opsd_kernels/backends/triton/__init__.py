"""Row functions as Triton kernels, for NVIDIA and AMD GPUs; the contracts are those of `backends/torch`.

They compute in fp32 on fp32 logits. Not yet measured on a GPU: checked in Triton's interpreter against fp64,
and compiled ahead of time for every target.
"""

import torch
import triton

from opsd_kernels.backends.triton.rows import (
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
    """Why these kernels cannot run there, as `"on cpu"`; None if they can."""
    if dtype != torch.float32:
        return f"for {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"on {device.type} (a GPU, or TRITON_INTERPRET=1 for Triton's interpreter)"
    return None

"""Fused loss engine for on-policy self-distillation.

`loss` and `token_stats` work from hidden states and the LM head, in chunks, and never hold `[tokens,
vocabulary]` logits. Importing this package imports torch alone.
"""

from opsd_kernels.api import TokenStats, loss, token_stats
from opsd_kernels.objectives import Objective, get_objective, named_objectives
from opsd_kernels.sources import Hidden, Logits

__version__ = "0.1.0"
__all__ = [
    "Hidden",
    "Logits",
    "Objective",
    "TokenStats",
    "get_objective",
    "loss",
    "named_objectives",
    "token_stats",
]

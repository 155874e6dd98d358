"""Fused loss engine for on-policy self-distillation.

`loss`, `loss_and_stats` and `token_stats` work from hidden states and the LM head, in chunks, and never hold
`[tokens, vocabulary]` logits. Importing this package imports torch alone.
"""

from opsd_kernels.api import LossAndStats, TokenStats, loss, loss_and_stats, token_stats
from opsd_kernels.objectives import Objective, Support, get_objective, named_objectives
from opsd_kernels.sources import Hidden, Logits, LogLinear, Mixture, Routed

__version__ = "0.1.0"
__all__ = [
    "Hidden",
    "LogLinear",
    "Logits",
    "LossAndStats",
    "Mixture",
    "Objective",
    "Routed",
    "Support",
    "TokenStats",
    "get_objective",
    "loss",
    "loss_and_stats",
    "named_objectives",
    "token_stats",
]

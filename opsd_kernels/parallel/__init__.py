"""Losses over a vocabulary that the ranks of a process group hold together, a slice of the head each.

The functions are those of `opsd_kernels`, called on every rank of the group with the same hidden states and
options, and with the rank's rows `[V_r, H]` of the heads (in the order of the ranks; unequal and empty slices
are allowed). No rank ever holds `[N, V]` logits, or its part `[N, V_r]` of them. Every rank gets the same
loss and statistics, to the last bit.
"""

from opsd_kernels.parallel.api import loss, loss_and_stats, token_logprobs, token_stats
from opsd_kernels.parallel.dtensors import from_dtensor

__all__ = ["from_dtensor", "loss", "loss_and_stats", "token_logprobs", "token_stats"]

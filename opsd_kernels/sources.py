"""Where a next-token distribution comes from: hidden states with a head, or logits."""

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch


@dataclass(frozen=True)
class Hidden:
    """Hidden states projected by a head: `z = cap(logit_scale * (hidden @ weight.T + bias))`.

    Args:
        hidden: `[..., H]`, the backbone's last hidden states.
        weight: `[V, H]`, the head (`lm_head.weight`).
        bias: `[V]` or None. Entries of -inf take a column out of the vocabulary, unless a soft-cap makes them
            finite.
        logit_scale: multiplies the logits (Cohere's `logit_scale`; 1 / Granite's `logits_scaling`).
        softcap: `cap(z) = softcap * tanh(z / softcap)` (Gemma 2's `final_logit_softcapping`); None: no cap.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def lead(self) -> torch.Size:
        """Shape of the token dimensions."""
        return self.hidden.shape[:-1]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.hidden.device

    @property
    def vocab(self) -> int:
        """Columns of the distribution."""
        return self.weight.shape[0]

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Tensors that can receive a gradient: hidden, weight, bias."""
        return (self.hidden, self.weight, self.bias)

    def with_tensors(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> "Hidden":
        """The same source over other tensors, in the order of `tensors`."""
        return replace(self, hidden=hidden, weight=weight, bias=bias)

    def flat(self, vocab: int) -> "Hidden":
        """Token dimensions flattened to N, columns from `vocab` on dropped; gradients flow through."""
        bias = None if self.bias is None else self.bias[:vocab]
        weight = self.weight if vocab == self.vocab else self.weight[:vocab]
        return replace(self, hidden=self.hidden.reshape(-1, self.hidden.shape[-1]), weight=weight, bias=bias)


@dataclass(frozen=True)
class Logits:
    """Logits given as they are.

    Args:
        z: `[..., V]`. Columns of -inf are out of the vocabulary.
    """

    z: torch.Tensor

    @property
    def lead(self) -> torch.Size:
        """Shape of the token dimensions."""
        return self.z.shape[:-1]

    @property
    def device(self) -> torch.device:
        """Where the tensor lives."""
        return self.z.device

    @property
    def vocab(self) -> int:
        """Columns of the distribution."""
        return self.z.shape[-1]

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Tensors that can receive a gradient."""
        return (self.z,)

    def with_tensors(self, z: torch.Tensor) -> "Logits":
        """The same source over other tensors, in the order of `tensors`."""
        return replace(self, z=z)

    def flat(self, vocab: int) -> "Logits":
        """Token dimensions flattened to N, columns from `vocab` on dropped; gradients flow through."""
        z = self.z if vocab == self.vocab else self.z[..., :vocab]
        return replace(self, z=z.reshape(-1, vocab))


Source: TypeAlias = Hidden | Logits

"""Logits in 2 bytes an entry that keep the quality of fp32, as the paired-tile GEMM stores them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TiledSide:
    """One side's logits of C rows: entry v is `values[v] + tops[v // tile]`.

    Args:
        vocab: V.
        tile: columns of a tile.
        values: `[C, tiles * tile]` fp16, the logit less the largest of its tile.
        tops: `[C, tiles]` fp32, largest logit of each tile.
        sums: `[C, tiles]` fp32, sum of exp(value) of each tile.
    """

    vocab: int
    tile: int
    values: Tensor
    tops: Tensor
    sums: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(C, V)."""
        return self.values.shape[0], self.vocab

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.values.device

    def normaliser(self) -> tuple[Tensor, Tensor]:
        """Largest logit `[C]` fp32 and sum of exp(z - largest) `[C]` fp64 of the rows.

        fp64, so that a probability near 1 is right to the last bit of fp32 that the tiles' own sums leave.
        """
        top = self.tops.amax(1)
        # exp(-inf - -inf) of a row that is excluded as a whole is not a number; its sum is 0.
        share = torch.exp((self.tops - top[:, None]).double()).nan_to_num_(0.0)
        return top, (self.sums * share).sum(1)

    def gather(self, dim: int, ids: Tensor) -> Tensor:
        """fp32 logits `[C, K]` of the columns `ids`, as `torch.gather` of dense ones."""
        return self.values.gather(dim, ids).float() + self.tops.gather(dim, ids // self.tile)

    def gradient_memory(self, dtype: torch.dtype) -> Tensor:
        """`[C, V]` for the gradient: the values' own memory if it takes 2 bytes an entry."""
        if dtype.itemsize == self.values.element_size():
            return self.values.view(dtype)[:, : self.vocab]
        return torch.empty(self.shape, dtype=dtype, device=self.device)

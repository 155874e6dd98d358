"""How far a rollout goes, or counts: horizons of tokens, curricula of turns, a gate on its length.

A horizon is the `max_tokens` of a step's rollouts. Turns and the gate choose among the tokens of what was
written: the others are read by student and teacher, and do not count in the loss or its denominator.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels.registry import Registry
from opsd_kernels.tokens import Batch
from opsd_kernels.weights import weight

ORDERS = ("forward", "backward")
Horizon = Callable[..., int]
horizon: Registry[Horizon] = Registry("horizon")


@horizon
def full(step: int, longest: int) -> int:
    """`longest` tokens at every step."""
    return longest


@horizon
def progressive(step: int, longest: int, *, start: int = 100, grow: int = 100, every: int = 10) -> int:
    """`min(T, H0 + dH floor(k / dk))` tokens at optimizer step k, counted from 0 (POPD, 2605.31490)."""
    if start < 1 or grow < 0 or every < 1:
        raise ValueError(
            f"horizon: expected start >= 1, grow >= 0 and every >= 1; got {start}, {grow} and {every}"
        )
    return min(longest, start + grow * (step // every))


@horizon
def share(step: int, longest: int, *, rho: float = 0.1) -> int:
    """`floor(rho T)` tokens at every step, at least one (TOPD, 2605.31490)."""
    if not 0 < rho <= 1:
        raise ValueError(f"rho: expected a share above 0 and at most 1; got {rho}")
    return max(1, int(rho * longest + 1e-9))  # 0.29 * 100 is 29 tokens, whatever the rounding


@dataclass(frozen=True)
class Turns:
    """A curriculum of turns: `k_start + floor(n / eta)` of them at optimizer step n (TCOD, 2604.24005).

    Args:
        start: turns that count at the first step, k_start.
        every: steps after which one more does, eta.
        order: see `turn_mask`.
    """

    start: int = 1
    every: int = 10
    order: str = "forward"

    def __post_init__(self) -> None:
        if self.start < 1 or self.every < 1:
            raise ValueError(f"expected start >= 1 and every >= 1; got {self.start} and {self.every}")
        if self.order not in ORDERS:
            raise ValueError(f"expected an order among {', '.join(ORDERS)}; got {self.order!r}")

    def shown(self, step: int) -> int:
        """Turns that count at a step, counted from 0."""
        return self.start + step // self.every


@dataclass(frozen=True)
class Counting:
    """Which tokens of the rollouts count.

    Args:
        turns: the curriculum, or None for all turns.
        longest: rollouts of more tokens do not count at all (2605.11182), or None for no gate.
    """

    turns: Turns | None = None
    longest: int | None = None

    def __call__(self, step: int, mask: Tensor, turn: Tensor | None = None) -> Tensor:
        """The tokens of a mask [B, C] that count at an optimizer step, [B, C] bool.

        Args:
            step: counted from 0.
            mask: 1 at the tokens of the rollouts.
            turn: `[B, C]`, the turn of each token; needed for a curriculum alone.
        """
        live = mask.bool()
        gated = live
        if self.longest is not None:
            gated = weight["length_gate"](Batch(live), tokens=self.longest).bool()
        if self.turns is None:
            return gated
        assert turn is not None
        return gated & turn_mask(live, turn, self.turns.shown(step), self.turns.order)


def turn_mask(mask: Tensor, turn: Tensor, count: int, order: str = "forward") -> Tensor:
    """The live tokens of `count` turns of each row, [B, C] bool.

    Args:
        mask: `[B, C]`, the live tokens.
        turn: `[B, C]` integers, the turn of each token, from 0.
        count: turns to keep; a row with fewer is kept whole.
        order: `forward` keeps the first ones (the rollout ends early), `backward` the last ones (what comes
            before them is the teacher's, or counts as given).
    """
    live = mask.bool()
    if order == "forward":
        return weight["turn"](Batch(live, {"turn": turn}), last=count - 1).bool()
    if order == "backward":
        last = torch.where(live, turn, -1).amax(dim=1, keepdim=True)
        return live & (turn > last - count)
    raise ValueError(f"order: expected one of {', '.join(ORDERS)}; got {order!r}")

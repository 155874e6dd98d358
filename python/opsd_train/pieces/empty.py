"""Steps in which no token counts: their loss is 0 and moves nothing, and they are counted."""

import warnings

from torch import Tensor

from opsd_train.steps import Batches

IN_A_ROW = 3  # after which a run warns


class EmptySteps:
    """Counts them. What they are told is the same in every process, and so is what they say.

    Args:
        gate: rollouts of more tokens do not count; None for no such gate.
    """

    def __init__(self, gate: int | None) -> None:
        self.gate, self.total, self.in_a_row = gate, 0, 0

    def heard(self, batches: Batches, tokens: int) -> tuple[Batches, int]:
        """The micro-batches of a step and its tokens, with 1 in place of 0 where a loss is divided by it."""
        counts = [count for batch in batches for name, count in batch.items() if name.startswith("count_")]
        empty = not tokens or (bool(counts) and not any(bool(count) for count in counts))
        self.total += empty
        self.in_a_row = self.in_a_row + 1 if empty else 0
        if self.in_a_row == IN_A_ROW:
            why = "" if self.gate is None else f"; length_gate {self.gate} leaves out all longer rollouts"
            warnings.warn(f"no token has counted in {IN_A_ROW} steps in a row{why}", stacklevel=2)
        return [{name: _divisor(name, value) for name, value in batch.items()} for batch in batches], max(
            tokens, 1
        )

    def metrics(self) -> dict[str, float]:
        """How many there have been, if any."""
        return {"empty_steps": float(self.total)} if self.total else {}


def _divisor(name: str, value: Tensor) -> Tensor:
    return value.masked_fill(value == 0, 1) if name.startswith("count_") else value

"""The micro-batches of an optimizer step, made of its rollouts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_train.data.columns import Step
from opsd_train.method import MethodRun
from opsd_train.offline.cache import CachedRollout
from opsd_train.offline.train import stored_columns
from opsd_train.pieces.horizon import Counting
from opsd_train.rollouts import Rollout, collate


@dataclass(frozen=True)
class Written:
    """What the student wrote in a step.

    Args:
        step: counted from 0.
        rollouts: all of them.
        parts: which make a micro-batch each.
        stored: the same with what a cache holds of them; None for those just written.
    """

    step: int
    rollouts: Sequence[Rollout]
    parts: Sequence[slice]
    stored: Sequence[CachedRollout] | None = None


Batches = list[dict[str, Tensor]]
Total = Callable[[Tensor], Tensor]


def plain_batches(
    written: Written, counting: Counting, pad_id: int, total: Total = lambda count: count
) -> tuple[Batches, int]:
    """The micro-batches, for a divergence to one teacher, and the tokens that count in the whole step.

    The step is that of all processes, over which `total` sums.
    """
    batches = [collate(written.rollouts[part], pad_id) for part in written.parts]
    for batch in batches:
        batch["counted"] = counting(written.step, batch["completion_mask"])
    return batches, int(total(torch.stack([batch["counted"].sum() for batch in batches]).sum()))


def method_batches(
    written: Written, method: MethodRun, counting: Counting, pad_id: int, total: Total = lambda count: count
) -> tuple[Batches, Step]:
    """The micro-batches with the columns of a method and what its loss is divided by, and the whole step.

    It is divided by what counts in all processes, over which `total` sums.
    """
    found = method.step(written.rollouts)
    columns = method.columns(found)

    def batch_of(part: slice) -> dict[str, Tensor]:
        batch = method.collate(found, columns, part, pad_id)
        batch["counted"] = counting(written.step, batch["completion_mask"], batch.get("data_turn"))
        if written.stored is not None:
            batch |= stored_columns(written.stored[part], method, pad_id)
        return batch

    counts = method.denominators(written.step, batch_of(slice(0, len(written.rollouts))), total)
    return [batch_of(part) | counts for part in written.parts], found

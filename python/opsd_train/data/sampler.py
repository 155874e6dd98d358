"""Which prompts are read when."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from transformers import Trainer

from opsd_train.config import OPSDConfig


class Repeated(torch.utils.data.Sampler[int]):
    """A random order of `size` rows that the seed and the epoch determine, every row `count` times in a row.

    Args:
        size: rows.
        count: how often each is yielded.
        seed: of the order.
    """

    def __init__(self, size: int, count: int, seed: int) -> None:
        self.order = SeedableRandomSampler(range(size), data_seed=seed)
        self.count = count

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order is next."""
        self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        for index in self.order:
            yield from [index] * self.count

    def __len__(self) -> int:
        return len(self.order) * self.count


class Ordered(Trainer):
    """A `Trainer` that reads its rows in the same order however often it is stopped and resumed."""

    config: OPSDConfig
    _order: Repeated | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int] | None:
        """Every prompt `num_generations` times in a row, so that its rollouts are in one step.

        Shuffled by a generator of its own: the global seed may be another one in a run that goes on.
        """
        found, count = super()._get_train_sampler(train_dataset), self.config.num_generations
        if count == 1 and type(found) is not torch.utils.data.RandomSampler:
            return found
        seed = self.config.seed if self.config.data_seed is None else self.config.data_seed
        self._order = Repeated(len(self.train_dataset), count, seed)  # type: ignore[arg-type]
        return self._order

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch, whose order the sampler is told here."""
        if self._order is not None:
            # Behind accelerate's samplers of shares and of skipped batches nobody else reaches it.
            self._order.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)


def short_steps(rows: int, wanted: int, processes: int) -> str | None:
    """What happens if the rows are fewer than the prompts of a step; None if they are not.

    A step ends with the epoch: it has the rows that there are. Several processes each get as much.
    """
    if rows >= wanted:
        return None
    then = f"a step has {rows}" if processes == 1 else "a step is smaller, or has rows more than once"
    return f"data: {rows} rows are fewer than the {wanted} prompts of a step; {then}"


def parts_of(sizes: Sequence[int]) -> list[slice]:
    """Slices of consecutive parts of these sizes."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]

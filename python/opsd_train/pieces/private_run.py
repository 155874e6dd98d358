"""Differentially private steps in a run: which rows a step draws, and the gradient that it makes of them."""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opsd_train.pieces.private import NotFinite, PrivateGradient, epsilon
from opsd_train.reading.prompts import Prompt


@dataclass(frozen=True)
class PrivateSettings:
    """How private a run's steps are.

    Args:
        clip: bound C of the norm of a row's gradient.
        noise: sigma; the noise has standard deviation sigma C in every coordinate of the sum.
        delta: of the epsilon that is logged.
        seed: of the rows drawn and of the noise. None takes one of the operating system's, as privacy needs:
            whoever knows the seed can subtract the noise. With a seed a run can be repeated.
    """

    clip: float = 1.0
    noise: float = 1.0
    delta: float = 1e-5
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("clip", "noise"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a finite number above 0; got {getattr(self, name)}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta: expected a number between 0 and 1; got {self.delta}")


class PrivateSteps:
    """The steps of a run by DP-SGD (DP-OPD, arXiv 2604.04461).

    Every step draws each row on its own with probability q = `batch_size` / `rows`, so that it has
    `batch_size` of them on average and may have none. The loss of a row is its own mean. Epsilon is that of
    the weights alone: what a run logs and records of its training rows is not private.

    A row whose gradient is not finite adds nothing, which is within the bound of any row. Leaving out its
    whole step would let the row decide about the step, noise and all, and epsilon does not cover that.

    Args:
        settings: see `PrivateSettings`.
        model: the student, on its device.
        rows: of the training set.
        batch_size: expected rows of a step.
    """

    def __init__(self, settings: PrivateSettings, model: torch.nn.Module, rows: int, batch_size: int) -> None:
        if batch_size > rows:
            raise ValueError(
                f"private: expected per_device_train_batch_size at most the {rows} training rows; "
                f"got {batch_size}"
            )
        self.settings, self.batch_size = settings, batch_size
        self.rate = batch_size / rows
        self.seed = secrets.randbits(128) if settings.seed is None else settings.seed
        parameters = [one for one in model.parameters() if one.requires_grad]
        self.generator = torch.Generator(parameters[0].device)
        self.gradient = PrivateGradient(parameters, settings.clip, settings.noise, self.generator)
        self.dropped = 0  # rows whose gradient was not finite

    def draw(self, prompts: Sequence[Prompt], step: int) -> list[Prompt]:
        """The rows of an optimizer step, counted from 0, in their order."""
        chosen = np.random.default_rng((self.seed, step, 0)).random(len(prompts)) < self.rate
        return [prompt for prompt, taken in zip(prompts, chosen, strict=True) if taken]

    def step(
        self, batch: Mapping[str, Tensor], step: int, loss_of: Callable[[dict[str, Tensor]], Tensor]
    ) -> Tensor:
        """Write the private gradient of a step's rows into `.grad`.

        Args:
            batch: all rows of the step, each tensor [B, ...]; empty for a step without rows.
            step: counted from 0.
            loss_of: the loss of a batch of one row, divided by its own tokens.

        Returns:
            The mean loss over the expected rows, without noise; NaN if a row was dropped.
        """
        total = torch.zeros((), device=self.generator.device)
        rows = len(batch["input_ids"]) if batch else 0
        for i in range(rows):
            loss = loss_of({name: x[i : i + 1] for name, x in batch.items() if not name.startswith("count_")})
            try:
                self.gradient.add(loss)
            except NotFinite:
                self.dropped += 1
                loss = loss * math.nan
            total = total + loss.detach()
        words = np.random.SeedSequence((self.seed, step, 1)).generate_state(1, np.uint64)
        self.generator.manual_seed(int(words[0]))
        self.gradient.finish(self.batch_size)
        return total / self.batch_size

    def metrics(self, steps: int) -> dict[str, float]:
        """`epsilon` after so many optimizer steps, and the rows dropped since training was last begun."""
        spent = epsilon(self.settings.noise, self.rate, steps, self.settings.delta)
        return {"epsilon": spent, "dropped_rows": self.dropped}

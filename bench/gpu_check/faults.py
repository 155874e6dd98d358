"""Faults planted into every backend: `--self-test` shows that the checks can fail."""

from itertools import count
from typing import Any

import torch

import opsd_kernels
from opsd_kernels import api, testing

FACTOR = 1.1  # what bf16 rounding cannot explain


def install() -> None:
    """Makes `opsd_kernels.loss` wrong by a tenth, different at every call, and waiting for the device.

    One fault for each kind of check: values, repeats, host syncs (which break capture and full graphs too).
    """
    good, calls = api.loss, count(1)

    def faulty(*arguments: Any, **options: Any) -> torch.Tensor:
        value = good(*arguments, **options)
        if options.get("backend") == "reference":
            return value
        value.detach().sum().item()
        return value * (FACTOR + 1e-3 * next(calls))

    for module in (opsd_kernels, testing):
        module.loss = faulty  # type: ignore[attr-defined]

"""This project's engine: its defaults, its backends, its modes."""

from functools import partial
from typing import Any

import torch

import opsd_kernels
from bench.cases import Case, Inputs
from bench.contenders.base import Contender

ENGINE = "opsd_kernels"
GRAD_FILTER = 2**-14
engine: Any = opsd_kernels  # options that older versions lack are found out at the first call


def engine_loss(inputs: Inputs, case: Case, **options: Any) -> torch.Tensor:
    """`opsd_kernels.loss` with the given options."""
    loss = engine.loss(
        inputs.student,
        inputs.teacher,
        inputs.head,
        objective=case.loss_objective,
        mask=inputs.mask,
        temperature=case.temperature,
        **options,
    )
    if options.get("reduction") == "none":
        loss = loss.sum() / inputs.count
    loss.backward()
    return loss.detach()


def engine_rows(inputs: Inputs, case: Case) -> torch.Tensor:
    """The rows that count by index instead of by mask, which costs no synchronization with a GPU."""
    loss = engine.loss(
        inputs.student,
        inputs.teacher,
        inputs.head,
        objective=case.loss_objective,
        rows=inputs.live_rows,
        temperature=case.temperature,
    )
    loss.backward()
    return loss.detach()


def _dropped_share(inputs: Inputs, case: Case) -> str:
    """What the filter left out of the gradient. It is only known where a gradient is computed."""
    result = engine.loss_and_stats(
        inputs.student,
        inputs.teacher,
        inputs.head,
        objective=case.loss_objective,
        mask=inputs.mask,
        temperature=case.temperature,
        grad_filter=GRAD_FILTER,
    )
    share = result.stats.dropped_share[inputs.live_rows].mean()
    return f"filter drops {float(share):.2%} of |dz|"


def _default_on_a_cpu(case: Case) -> str | None:
    return f"the same as {ENGINE} on a CPU" if case.device == "cpu" else None


def _needs_a_mask(case: Case) -> str | None:
    return None if case.masked else f"the same as {ENGINE} without a mask"


ours = partial(Contender, ours=True)
OURS = (
    ours(ENGINE, engine_loss),
    ours("opsd_kernels, torch", partial(engine_loss, backend="torch"), redundant=_default_on_a_cpu),
    ours("opsd_kernels, triton", partial(engine_loss, backend="triton"), optional=True),
    ours("opsd_kernels, triton_paired", partial(engine_loss, backend="triton_paired"), optional=True),
    ours("opsd_kernels, per token", partial(engine_loss, reduction="none")),
    ours("opsd_kernels, row indices", engine_rows, optional=True, redundant=_needs_a_mask),
    ours(
        "opsd_kernels, filter 2^-14",
        partial(engine_loss, grad_filter=GRAD_FILTER),
        optional=True,
        approximate=True,
        note=_dropped_share,
    ),
)

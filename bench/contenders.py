"""What is compared. Each contender computes the mean loss and fills `.grad` of the inputs' leaves."""

from collections.abc import Callable

import torch

import opsd_kernels
from bench.cases import Inputs
from opsd_kernels import Hidden
from opsd_kernels.testing import eager_loss

Contender = Callable[[Inputs, str], torch.Tensor]


def floor(inputs: Inputs, objective: str) -> torch.Tensor:
    """The bare matrix products that the loss needs (no dW for a frozen head): a bound of its time."""
    with torch.no_grad():
        z_s = inputs.student @ inputs.head.T
        z_t = inputs.teacher @ inputs.head.T
        dh = z_s @ inputs.head
        if inputs.head.requires_grad:
            dw = z_t.T @ inputs.student
            return dh[0, 0] + dw[0, 0]
        return dh[0, 0] + z_t[0, 0]


def eager(inputs: Inputs, objective: str) -> torch.Tensor:
    """Plain PyTorch with full `[N, V]` logits, as a trainer's own code does it."""
    loss = eager_loss(
        Hidden(inputs.student, inputs.head),
        Hidden(inputs.teacher, inputs.head.detach()),
        objective=objective,
    )
    loss.backward()
    return loss.detach()


def engine(inputs: Inputs, objective: str) -> torch.Tensor:
    """`opsd_kernels.loss` with its defaults."""
    loss = opsd_kernels.loss(inputs.student, inputs.teacher, inputs.head, objective=objective)
    loss.backward()
    return loss.detach()


def engine_per_token(inputs: Inputs, objective: str) -> torch.Tensor:
    """`opsd_kernels.loss(reduction="none")`: design B, six GEMMs, for upstream gradients per token."""
    tokens = opsd_kernels.loss(
        inputs.student, inputs.teacher, inputs.head, objective=objective, reduction="none"
    )
    loss = tokens.mean()
    loss.backward()
    return loss.detach()


FLOOR = "bare matrix products"
EAGER = "eager PyTorch, full logits"
ENGINE = "opsd_kernels"
CONTENDERS: dict[str, Contender] = {
    FLOOR: floor,
    EAGER: eager,
    ENGINE: engine,
    "opsd_kernels, per token": engine_per_token,
}

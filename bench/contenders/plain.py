"""The yardsticks: the bare matrix products, and eager PyTorch with full logits."""

from dataclasses import replace

import torch

from bench.cases import Case, Inputs
from bench.contenders.base import Contender
from opsd_kernels import Hidden
from opsd_kernels.testing import eager_loss

FLOOR = "bare matrix products"
EAGER = "eager PyTorch, full logits"


@torch.no_grad()
def floor(inputs: Inputs, case: Case) -> torch.Tensor:
    """The bare matrix products that the loss needs, over the rows that count (no dW for a frozen head).

    Full N each, the case's tensors, layouts and dtype. One `[N, V]` buffer holds both models' logits in turn
    and stands for their gradient.
    """
    head = inputs.head.detach()
    chunks = (states.chunk(inputs.floor_pieces) for states in inputs.live_states)
    for student, teacher in zip(*chunks, strict=True):
        z = torch.mm(teacher, head.T)
        torch.mm(student, head.T, out=z)
        torch.mm(z, head)
        if inputs.head.requires_grad:
            torch.mm(z.T, student)
    return z[0, 0]


def eager(inputs: Inputs, case: Case) -> torch.Tensor:
    """Plain PyTorch with full `[N, V]` logits in the inputs' dtype, as a trainer's own code does it."""
    return _eager(Hidden(inputs.student, inputs.head), inputs, case)


def eager_fp32(inputs: Inputs, case: Case) -> torch.Tensor:
    """The same with logits that are computed in fp32, from operands cast to fp32, as careful trainers do."""
    return _eager(Hidden(inputs.student.float(), inputs.head.float()), inputs, case)


def _eager(student: Hidden, inputs: Inputs, case: Case) -> torch.Tensor:
    teacher = replace(student, hidden=inputs.teacher.to(student.hidden.dtype), weight=student.weight.detach())
    loss = eager_loss(
        student,
        teacher,
        objective=case.loss_objective,
        mask=inputs.mask,
        temperature=case.temperature,
    )
    loss.backward()
    return loss.detach()


PLAIN = (
    Contender(FLOOR, floor),
    Contender(EAGER, eager),
    Contender(
        "eager PyTorch, fp32 logits",
        eager_fp32,
        redundant=lambda case: None if case.reduced_precision else f"the same as {EAGER} in fp32",
    ),
)

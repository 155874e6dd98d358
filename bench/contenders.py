"""What is compared. Each contender computes the mean loss and fills `.grad` of the inputs' leaves."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import opsd_kernels
from bench.cases import Inputs
from opsd_kernels import Objective

Contender = Callable[[Inputs, str], torch.Tensor]


def floor(inputs: Inputs, objective: str) -> torch.Tensor:
    """The bare matrix products that any 4-GEMM method needs; a lower bound of the time, not a loss."""
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
    log_s = F.log_softmax(F.linear(inputs.student, inputs.head).float(), dim=-1)
    with torch.no_grad():
        log_t = F.log_softmax(F.linear(inputs.teacher, inputs.head).float(), dim=-1)
    terms = eager_terms(log_s, log_t, opsd_kernels.get_objective(objective))
    loss = terms.sum() / terms.shape[0]
    loss.backward()
    return loss.detach()


def eager_terms(log_s: torch.Tensor, log_t: torch.Tensor, objective: Objective) -> torch.Tensor:
    """`[N, V]` terms l_v by torch's own functions, clipped."""
    if objective.divergence == "forward_kl":
        terms = F.kl_div(log_s, log_t, reduction="none", log_target=True)
    elif objective.divergence == "reverse_kl":
        terms = F.kl_div(log_t, log_s, reduction="none", log_target=True)
    else:
        beta = torch.tensor(objective.beta, dtype=log_s.dtype, device=log_s.device)
        log_m = torch.logaddexp(log_t + beta.log(), log_s + (1 - beta).log())
        to_teacher = F.kl_div(log_m, log_t, reduction="none", log_target=True)
        to_student = F.kl_div(log_m, log_s, reduction="none", log_target=True)
        terms = beta * to_teacher + (1 - beta) * to_student
    return terms if objective.entry_clip is None else terms.clamp(max=objective.entry_clip)


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


FLOOR = "four bare GEMMs"
EAGER = "eager PyTorch, full logits"
ENGINE = "opsd_kernels"
CONTENDERS: dict[str, Contender] = {
    FLOOR: floor,
    EAGER: eager,
    ENGINE: engine,
    "opsd_kernels, per token": engine_per_token,
}

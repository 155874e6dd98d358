"""PyTorch with torch.compile: the full loss, and the strong baseline in chunks of rows."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
import torch.nn.functional as F

from bench.cases import Case, Inputs
from bench.contenders.base import Contender

OPSD_CLIP = 0.05


@contextmanager
def static_compilation(contenders: Iterable[Contender]) -> Iterator[None]:
    """Starts torch.compile afresh and lets it specialise for every shape, as in training at one shape.

    By default a second shape of a run would turn the compiled peers into slower code for any shape. Without
    compiled contenders it does nothing, and does not wait for the compiler's import.
    """
    if not any(contender.compiles for contender in contenders):
        yield
        return
    import torch._dynamo

    torch._dynamo.reset()
    with torch._dynamo.config.patch(
        automatic_dynamic_shapes=False, recompile_limit=64, fail_on_recompile_limit_hit=True
    ):
        yield


def row_loss(
    z_s: torch.Tensor, z_t: torch.Tensor, objective: str, beta: float, temperature: float
) -> torch.Tensor:
    """Loss of every row of two tensors of logits `[n, V]`, in fp32."""
    ls = F.log_softmax(z_s.float() / temperature, -1)
    lt = F.log_softmax(z_t.float() / temperature, -1)
    if objective == "reverse_kl":
        return (ls.exp() * (ls - lt)).sum(-1)
    if objective == "jsd":
        lm = torch.logaddexp(lt + math.log(beta), ls + math.log1p(-beta))
        return (beta * lt.exp() * (lt - lm) + (1 - beta) * ls.exp() * (ls - lm)).sum(-1)
    terms = lt.exp() * (lt - ls)
    return (terms.clamp(max=OPSD_CLIP) if objective == "opsd" else terms).sum(-1)


@cache
def _compiled_full(objective: str, beta: float, temperature: float) -> Callable[..., torch.Tensor]:
    def full(
        student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        rows = row_loss(
            F.linear(student, head), F.linear(teacher, head.detach()), objective, beta, temperature
        )
        return rows.mean() if mask is None else (rows * mask).sum() / mask.sum()

    return torch.compile(full, fullgraph=True, dynamic=False)


def compiled_full(inputs: Inputs, case: Case) -> torch.Tensor:
    """The whole loss in one compiled graph."""
    full = _compiled_full(case.objective, case.beta, case.temperature)
    loss = full(inputs.student, inputs.teacher, inputs.head, inputs.mask)
    loss.backward()
    return loss.detach()


@cache
def _compiled_rows(
    objective: str, beta: float, temperature: float
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def total(z_s: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
        return row_loss(z_s, z_t, objective, beta, temperature).sum()

    def rows(
        z_s: torch.Tensor, z_t: torch.Tensor, scale: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gradient, value = torch.func.grad_and_value(total)(z_s, z_t)
        return value * scale, (gradient * scale).to(dtype)

    return torch.compile(rows, fullgraph=True, dynamic=False)


def compiled_chunks(inputs: Inputs, case: Case, *, chunk: int) -> torch.Tensor:
    """Gradient in the forward pass over chunks of rows: matrix products of the library, the rest compiled.

    What a good engineer writes without a kernel: only the rows that count, on a GPU fp32 logits straight
    from the product and dW accumulated in fp32.
    """
    rows = _compiled_rows(case.objective, case.beta, case.temperature)
    head, (student, teacher) = inputs.head.detach(), inputs.live_states
    if inputs.mask is not None:  # the gathering is part of the work
        student, teacher = inputs.student.detach()[inputs.live_rows], inputs.teacher[inputs.live_rows]
    total = torch.zeros((), device=head.device)
    dh = torch.empty_like(student)
    dw = torch.zeros_like(head, dtype=torch.float32) if inputs.head.requires_grad else None
    for start in range(0, len(student), chunk):
        part = slice(start, start + chunk)
        z_s, z_t = _logits(student[part], head), _logits(teacher[part], head)
        value, gradient = rows(z_s, z_t, 1 / inputs.count, head.dtype)
        del z_s, z_t
        total += value
        torch.mm(gradient, head, out=dh[part])
        if dw is not None:
            _accumulate(dw, gradient.T, student[part])
    if inputs.mask is not None:
        dh = torch.zeros_like(inputs.student).index_copy_(0, inputs.live_rows, dh)
    inputs.student.grad = dh
    inputs.head.grad = None if dw is None else dw.to(head.dtype)
    return total


def _logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return torch.mm(hidden, head.T)


def _accumulate(dw: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if dw.is_cuda and left.dtype != torch.float32:
        torch.addmm(dw, left, right, out_dtype=torch.float32, out=dw)
    else:
        dw.add_(torch.mm(left, right))


def _one_chunk(case: Case) -> str | None:
    return "one chunk of 1024 rows holds them all" if case.rows <= 1024 else None


COMPILED = (
    Contender("torch.compile, full logits", compiled_full, compiles=True),
    Contender("torch.compile, chunks of 1024", partial(compiled_chunks, chunk=1024), compiles=True),
    Contender(
        "torch.compile, chunks of 4096",
        partial(compiled_chunks, chunk=4096),
        compiles=True,
        redundant=_one_chunk,
    ),
)

"""The published kernels for the same loss, each by the entry point that its users call."""

from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from bench.cases import Case, Inputs
from bench.contenders.base import UNCLIPPED, Contender

TRL_ROWS = 4096  # rows of a chunk that the package chooses
TRL_MORE_ROWS = 16384


def liger_fused(inputs: Inputs, case: Case, *, accumulate: torch.dtype | None = None) -> torch.Tensor:
    """Liger's Triton kernel in chunks of about N H / V rows; `accumulate` is the dtype of its dW."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    loss = LigerFusedLinearJSDFunction.apply(
        inputs.student,
        inputs.head,
        inputs.teacher,
        inputs.head.detach(),
        None if inputs.mask is None else inputs.labels,
        case.peer_beta,
        -100,
        case.temperature,
        accumulate,
    )
    loss.backward()
    return loss.detach()


def liger_chunked(inputs: Inputs, case: Case, *, compiled: bool, chunk: int) -> torch.Tensor:
    """Liger's loss by torch.func over chunks of rows, without its cross-entropy part."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    function = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=case.peer_beta,
        temperature=case.temperature,
        compiled=compiled,
        chunk_size=chunk,
    )
    loss = function(inputs.student, inputs.head, inputs.teacher, inputs.head.detach(), inputs.labels)
    loss.backward()
    return loss.detach()


def trl_chunked(inputs: Inputs, case: Case, *, rows: int = TRL_ROWS) -> torch.Tensor:
    """TRL's own loss; rows are selected as its distillation trainer does, by index only where Triton runs."""
    from trl.kernels import chunked_divergence

    student, teacher = inputs.student, inputs.teacher
    if inputs.mask is not None and student.is_cuda:
        student, teacher = student[inputs.mask], teacher[inputs.mask]
    with _attribute(chunked_divergence, "TOKEN_CHUNK_SIZE", rows):
        tokens, _ = chunked_divergence.ChunkedDivergenceFunction.apply(
            student,
            inputs.head,
            None,
            teacher,
            inputs.head.detach(),
            None,
            case.peer_beta,
            case.temperature,
        )
        if inputs.mask is not None and not student.is_cuda:
            tokens = tokens.masked_fill(~inputs.mask, 0)
        loss = tokens.sum() / inputs.count
        loss.backward()
    return loss.detach()


def fla_fused(inputs: Inputs, case: Case, *, tf32: bool) -> torch.Tensor:
    """fla's Triton kernel. Its dW product has fp32 operands, so TF32, off by default, decides its speed."""
    from fla.modules.fused_kl_div import fused_kl_div_loss

    with _attribute(torch.backends.cuda.matmul, "allow_tf32", tf32):
        loss = fused_kl_div_loss(inputs.student, inputs.teacher, inputs.head, inputs.head.detach())
        loss.backward()
    return loss.detach()


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Any:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _fits_one_chunk(case: Case) -> str | None:
    return f"the same as its default up to {TRL_ROWS} rows" if case.rows <= TRL_ROWS else None


def _liger_rows(case: Case) -> str | None:
    return "the same as its default below 2048 rows" if case.rows < 2048 else None


liger = partial(Contender, objectives=UNCLIPPED, package="liger_kernel")
trl = partial(Contender, objectives=UNCLIPPED, package="trl")
fla = partial(
    Contender,
    objectives=frozenset({"forward_kl"}),
    masks=False,
    temperatures=False,
    package="fla",
    cuda_only=True,
)
PEERS = (
    liger("Liger FusedLinearJSD", liger_fused, cuda_only=True),
    liger("Liger FusedLinearJSD, fp32 dW", partial(liger_fused, accumulate=torch.float32), cuda_only=True),
    liger("Liger chunked JSD, eager", partial(liger_chunked, compiled=False, chunk=1024)),
    liger("Liger chunked JSD", partial(liger_chunked, compiled=True, chunk=1024), compiles=True),
    liger(
        "Liger chunked JSD, 4096 rows",
        partial(liger_chunked, compiled=True, chunk=4096),
        compiles=True,
        redundant=_liger_rows,
    ),
    trl("TRL chunked divergence", trl_chunked),
    trl(
        f"TRL chunked divergence, {TRL_MORE_ROWS} rows",
        partial(trl_chunked, rows=TRL_MORE_ROWS),
        redundant=_fits_one_chunk,
    ),
    fla("fla KL", partial(fla_fused, tf32=False)),
    fla("fla KL, TF32", partial(fla_fused, tf32=True)),
)

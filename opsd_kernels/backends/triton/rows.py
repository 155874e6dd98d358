"""Launches of the row kernels, and the row-sized arithmetic between them."""

from contextlib import nullcontext
from typing import Any

import torch

from opsd_kernels.backends.triton import kernels
from opsd_kernels.engine.rows import RowStatistics, clip_tokens, clipped_fraction, divergence
from opsd_kernels.objectives import Objective

# 4,096 fp32 columns of two tensors over 8 warps are 16 values a thread each: no target spills.
BLOCK = 4096
# The statistics kernel keeps twice as much per entry.
STATS_BLOCK = 2048
WARPS = 8
# Programs that share a row, so that its second and third reading hit the L2 cache.
SPLITS = 4


def row_loss(z_s: torch.Tensor, z_t: torch.Tensor, objective: Objective) -> RowStatistics:
    """Statistics of the rows of `z_s` and `z_t` `[C, V]`, which are left as they are."""
    normaliser = _normaliser(z_s, z_t)
    value, weight, mass = _sums(z_s, z_t, normaliser, objective)
    loss, scale = clip_tokens(divergence(value, objective), objective)
    top_s, sum_s, top_t, sum_t = normaliser.unbind(-1)
    return RowStatistics(loss, top_s, sum_s, top_t, sum_t, weight / mass, scale)


def row_gradient_(
    z_s: torch.Tensor, z_t: torch.Tensor, objective: Objective, coefficient: torch.Tensor
) -> torch.Tensor:
    """Losses `[C]` of the rows, and `coefficient * dL/dz_s` in place of the teacher's logits."""
    statistics = row_loss(z_s, z_t, objective)
    slab_gradient_(z_s, z_t, objective, statistics, coefficient)
    return statistics.loss


def slab_gradient_(
    z_s: torch.Tensor,
    z_t: torch.Tensor,
    objective: Objective,
    statistics: RowStatistics,
    coefficient: torch.Tensor,
) -> None:
    """As `row_gradient_` for some columns of the rows: `[n, slab]` logits, `[n]` statistics of whole rows."""
    columns = (statistics.top_s, statistics.sum_s, statistics.top_t, statistics.sum_t)
    normaliser = torch.stack(columns, dim=-1)
    scale = (statistics.scale * coefficient).contiguous()
    rows = (normaliser, statistics.total.contiguous(), scale)
    _launch(kernels.gradient_kernel, z_s, z_t, rows, objective, clip=True)


def row_stats(
    z_s: torch.Tensor, z_t: torch.Tensor, objective: Objective, token_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`[C]` values of every field of `TokenStats`; `token_ids` is `[C]`."""
    normaliser = _normaliser(z_s, z_t)
    partial = _partial(z_s, 11)
    _launch(kernels.stats_kernel, z_s, z_t, (normaliser, partial), objective, clip=False)
    forward, reverse, jsd, entropy_s, entropy_t, positive, kept = partial[..., :7].sum(1).unbind(-1)
    loss = divergence(_sums(z_s, z_t, normaliser, objective)[0], objective)
    top_s, sum_s, top_t, sum_t = normaliser.unbind(-1)
    ids = token_ids[:, None]
    return {
        "forward_kl": divergence(forward, Objective("forward_kl")),
        "reverse_kl": divergence(reverse, Objective("reverse_kl")),
        "jsd": divergence(jsd, Objective("jsd")),
        "student_entropy": entropy_s,
        "teacher_entropy": entropy_t,
        "student_logprob": z_s.gather(-1, ids)[:, 0] - top_s - sum_s.log(),
        "teacher_logprob": z_t.gather(-1, ids)[:, 0] - top_t - sum_t.log(),
        "top1_agreement": (_first_best(partial[..., 7:9]) == _first_best(partial[..., 9:])).float(),
        "clipped_fraction": clipped_fraction(positive, kept, loss, objective),
    }


def _normaliser(z_s: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
    """`[C, 4]` student's maximum and sum of exp(z - maximum), teacher's likewise."""
    partial = _partial(z_s, 4)
    grid = (z_s.shape[0], SPLITS)
    arguments = (z_s, z_t, partial, z_s.shape[1], z_s.stride(0), z_t.stride(0))
    with _device(z_s):
        kernels.normaliser_kernel[grid](*arguments, SPLITS=SPLITS, BLOCK=BLOCK, num_warps=WARPS)
    tops, sums = partial[..., 0::2], partial[..., 1::2]
    top = tops.amax(1)
    # A part of excluded columns alone has a maximum of -inf and a sum of 0.
    total = (sums * torch.exp(tops - top[:, None]).nan_to_num(0.0)).sum(1)
    return torch.stack((top[:, 0], total[:, 0], top[:, 1], total[:, 1]), dim=-1)


def _sums(
    z_s: torch.Tensor, z_t: torch.Tensor, normaliser: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, ...]:
    """`[C]` sums over the vocabulary of the clipped value, the weight a and s."""
    partial = _partial(z_s, 3)
    _launch(kernels.loss_kernel, z_s, z_t, (normaliser, partial), objective, clip=True)
    return partial.sum(1).unbind(-1)


def _launch(
    kernel: Any,
    z_s: torch.Tensor,
    z_t: torch.Tensor,
    rows: tuple[torch.Tensor, ...],
    objective: Objective,
    clip: bool,
) -> None:
    """Runs a kernel over `[C, SPLITS]` programs; `clip` says whether it takes the clip as a constant."""
    tau = objective.entry_clip
    options: dict[str, Any] = {"NAME": objective.term.name, "MIXTURE": objective.term.uses_mixture}
    block = BLOCK if clip else STATS_BLOCK
    if clip:
        options["CLIP"] = "none" if tau is None else objective.clip_mode
    numbers = (z_s.shape[1], z_s.stride(0), z_t.stride(0), float(objective.beta), float(tau or 0.0))
    with _device(z_s):
        kernel[(z_s.shape[0], SPLITS)](
            z_s, z_t, *rows, *numbers, **options, SPLITS=SPLITS, BLOCK=block, num_warps=WARPS
        )


def _partial(z: torch.Tensor, width: int) -> torch.Tensor:
    return torch.empty(z.shape[0], SPLITS, width, dtype=torch.float32, device=z.device)


def _device(z: torch.Tensor) -> Any:
    """Launches go to the current device, which need not be the tensors'."""
    return torch.cuda.device(z.device) if z.is_cuda else nullcontext()


def _first_best(candidates: torch.Tensor) -> torch.Tensor:
    """`[C]` column of the largest value over the parts `[C, SPLITS, 2]`, the first one of equals."""
    part = candidates[..., 0].argmax(1, keepdim=True)
    return candidates[..., 1].gather(1, part)[:, 0]

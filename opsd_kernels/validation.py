"""Checks of everything a caller passes: a ValueError names the argument, what was expected and what came."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.checks import (
    FLOATS,
    IDS,
    check_device,
    check_ids,
    check_plain,
    check_positive,
    check_rows,
    check_scale,
    readable,
)
from opsd_kernels.objectives import Objective
from opsd_kernels.options import TokenStats
from opsd_kernels.sources import Hidden, Routed, Source, Teacher

REDUCTIONS = ("mean", "sum", "none", "sequence_mean", "sequences")


def check_reference(options: Any) -> None:
    """What the definition does not do: autograd forms its gradients."""
    for name in ("grad_filter", "main_grad"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name}: expected None with backend='reference'; got a value")


def check_ratio(objective: Objective, backend: str) -> None:
    """Logits of 2 bytes cannot hold a bounded teacher."""
    if objective.ratio_bound is not None and backend == "triton_paired":
        raise ValueError(f"clip_mode: expected zero or scale with backend {backend!r}; got 'ratio'")


def check_options(options: Any, objective: Objective, student: Source, teacher: Teacher, vocab: int) -> None:
    """Everything in `LossOptions` but the objective and the vocabulary."""
    lead, device = student.lead, student.tensors[0].device
    check_tokens(options, student)
    check_ids("token_ids", _that_count(options.token_ids, lead, options), 0, vocab)
    _check_support_ids(options, objective, lead, device, vocab)
    if isinstance(teacher, Routed):
        check_ids("teacher.index", _that_count(teacher.index, lead, options), 0, len(teacher.sources))
    if options.workspace_bytes is not None:
        check_positive("workspace_bytes", options.workspace_bytes)
    _check_filter(options, student)
    _check_main_grad(options.main_grad, student)


def check_tokens(options: Any, student: Source) -> None:
    """What is said per token has the student's token dimensions; temperature and reduction make sense."""
    lead, device = student.lead, student.tensors[0].device
    check_rows("mask", options.mask, lead, device, (torch.bool,))
    _check_row_indices(options.rows, options.mask, lead, device)
    if not callable(options.token_weight):
        check_rows("token_weight", options.token_weight, lead, device, FLOATS)
        _check_finite("token_weight", _that_count(options.token_weight, lead, options))
    check_rows("token_ids", options.token_ids, lead, device, IDS)
    check_scale("temperature", options.temperature)
    check_reduction(options.reduction, options.denominator)


def check_reduction(reduction: str, denominator: Any) -> None:
    """A known reduction, and a positive denominator with a mean only."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if denominator is None:
        return
    if isinstance(denominator, Mapping):
        for key in denominator:
            if key not in ("tokens", "sequences") and not str(key).startswith("term "):
                raise ValueError(
                    f"denominator: expected the keys 'tokens', 'sequences' and 'term k'; got {key!r}"
                )
        for count in denominator.values():
            check_reduction(reduction, count)
        return
    if reduction not in ("mean", "sequence_mean"):
        raise ValueError(f"denominator: expected None with reduction={reduction!r}; got {denominator}")
    if isinstance(denominator, Tensor):
        check_plain("denominator", denominator)
        if denominator.numel() != 1 or denominator.requires_grad:
            raise ValueError(
                "denominator: expected a number or a constant tensor of one element; got shape "
                f"{tuple(denominator.shape)}, requires_grad={denominator.requires_grad}"
            )
        if readable(denominator):
            check_positive("denominator", denominator.item())
    else:
        check_positive("denominator", denominator)


def check_weights(name: str, weights: Tensor, stats: TokenStats, live: Tensor | None) -> None:
    """Factors of the live tokens (None: of all) by a caller's function are finite; looked at on a CPU."""
    if not readable(weights):
        return
    check_ids_known(name, weights if live is None else torch.where(live, weights, 0.0), stats)
    _check_finite(name, weights if live is None else torch.where(live, weights, 0.0))


def _check_finite(name: str, weights: Tensor | None) -> None:
    """Factors of tokens that count are finite; looked at on a CPU alone, since a GPU would be waited for."""
    if weights is None or not readable(weights):
        return
    wrong = ~weights.isfinite()
    if wrong.any():
        raise ValueError(f"{name}: expected finite factors of the tokens; got {weights[wrong][0].item()}")


def check_ids_known(name: str, weights: Tensor, stats: TokenStats) -> None:
    """Weights made of log-probs of the sampled tokens need these."""
    if not readable(weights):
        return
    undefined = weights.isnan()
    if undefined.any() and stats.student_logprob[undefined].isnan().all():
        raise ValueError(
            f"token_ids, {name}: expected the sampled tokens, since without their log-probs a weight is NaN; "
            "got None, and a weight that is NaN"
        )


def _that_count(ids: Tensor | None, lead: torch.Size, options: Any) -> Tensor | None:
    """Ids or weights of the tokens that count; what others have does not matter."""
    if ids is None or not readable(ids):
        return ids
    if options.mask is not None:
        return ids[options.mask]
    return ids if options.rows is None else ids.reshape(lead.numel(), -1)[options.rows.long()]


def _check_row_indices(rows: Any, mask: Any, lead: torch.Size, device: torch.device) -> None:
    if rows is None:
        return
    if mask is not None:
        raise ValueError("rows: expected None beside a mask; got both")
    if isinstance(rows, Tensor):
        check_plain("rows", rows)
    if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype not in IDS:
        shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"rows: expected integer indices of shape [n]; got {shape}")
    check_device("rows", rows, device)
    check_ids("rows", rows, 0, lead.numel())
    if readable(rows) and rows.unique().numel() != rows.numel():
        raise ValueError("rows: expected each index once; got some repeatedly")


def _check_support_ids(
    options: Any, objective: Objective, lead: torch.Size, device: torch.device, vocab: int
) -> None:
    ids = options.support_ids
    given = objective.support is not None and objective.support.of == "given"
    if given != (ids is not None):
        expected = "the entries [..., K] of the support that is 'given'" if given else "None"
        raise ValueError(f"support_ids: expected {expected}; got {'None' if given else 'a tensor'}")
    if ids is None:
        return
    if isinstance(ids, Tensor):
        check_plain("support_ids", ids)
    if not isinstance(ids, Tensor) or ids.dim() != len(lead) + 1 or ids.shape[-1] == 0:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        expected = ", ".join(map(str, (*lead, "K")))
        raise ValueError(f"support_ids: expected shape ({expected}); got {shape}")
    check_rows("support_ids", ids, torch.Size((*lead, ids.shape[-1])), device, IDS)
    check_ids("support_ids", _that_count(ids, lead, options), -1, vocab)  # -1 stands for none


def _check_filter(options: Any, student: Source) -> None:
    if options.grad_filter is None:
        return
    check_positive("grad_filter", options.grad_filter)
    if options.grad_filter >= 1:
        raise ValueError(f"grad_filter: expected eps below 1, as 2**-14; got {options.grad_filter}")
    if not isinstance(student, Hidden):
        raise ValueError(f"grad_filter: expected None for logits; got {options.grad_filter}")
    if options.reduction == "none":
        raise ValueError(f"grad_filter: expected None with reduction='none'; got {options.grad_filter}")


def _check_main_grad(main_grad: Any, student: Source) -> None:
    if main_grad is None:
        return
    if not isinstance(student, Hidden) or not student.weight.requires_grad:
        raise ValueError("main_grad: expected None without a head that requires a gradient; got a tensor")
    if student.weight.dtype in (torch.float16, torch.float64):
        raise ValueError(f"main_grad: expected a head in fp32 or bf16; got {student.weight.dtype}")
    check_rows("main_grad", main_grad, student.weight.shape, student.weight.device, (torch.float32,))
    if not main_grad.is_contiguous():
        raise ValueError(f"main_grad: expected a contiguous tensor; got strides {main_grad.stride()}")

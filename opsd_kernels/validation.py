"""Checks of everything a caller passes: a ValueError names the argument, what was expected and what came."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.checks import FLOATS, IDS, check_device, check_ids, check_positive, check_rows, readable
from opsd_kernels.objectives import Objective
from opsd_kernels.sources import Hidden, Logits, LogLinear, Mixture, Routed, Source, Teacher

REDUCTIONS = ("mean", "sum", "none")
STREAMS: dict[type, tuple[type, ...]] = {
    LogLinear: (Hidden, Logits),
    Mixture: (Hidden, Logits, LogLinear),
    Routed: (Hidden, Logits, LogLinear, Mixture),
}


def as_source(name: str, value: Any, weight: Tensor | None) -> Source:
    """A checked source; a bare tensor becomes hidden states of the shared head `weight`."""
    if isinstance(value, Tensor):
        if weight is None:
            raise ValueError(
                f"weight: expected the head [V, H] that projects the hidden states `{name}`; got None "
                f"(for logits pass {name}=Logits(z))"
            )
        value = Hidden(value, weight)
    if isinstance(value, Hidden):
        _check_hidden(name, value)
    elif isinstance(value, Logits):
        _check_floats(f"{name}.z", value.z, "[..., V]", dims=None)
    else:
        raise ValueError(f"{name}: expected a tensor, Hidden or Logits; got {type(value).__name__}")
    return value


def as_teacher(name: str, value: Any, weight: Tensor | None) -> Teacher:
    """As `as_source`, or a checked combination of sources."""
    if not isinstance(value, LogLinear | Mixture | Routed):
        return as_source(name, value, weight)
    parts = _streams(name, value)
    if isinstance(value, LogLinear) and value.mix not in ("auto", "logits"):
        raise ValueError(f"{name}.mix: expected 'auto' or 'logits'; got {value.mix!r}")
    for index, part in enumerate(parts):
        here = f"{name}.{'sources' if isinstance(value, Routed) else 'streams'}[{index}]"
        right: bool = isinstance(part, STREAMS[type(value)])
        if not right:
            known = ", ".join(kind.__name__ for kind in STREAMS[type(value)])
            hint = ": wrap it as Hidden(hidden, weight)" if isinstance(part, Tensor) else ""
            raise ValueError(f"{here}: expected {known}; got {type(part).__name__}{hint}")
        as_teacher(here, part, None)
        _check_alike(here, part, parts[0])
    if isinstance(value, Routed):
        if value.index is None:
            raise ValueError(f"{name}.index: expected a tensor; got None")
        check_rows(f"{name}.index", value.index, value.lead, parts[0].tensors[0].device, IDS)
    else:
        _check_factors(name, value)
    return value


def _streams(name: str, value: LogLinear | Mixture | Routed) -> list[Any]:
    """The sources of a combined teacher, if it has any and they are given as they should be."""
    field = "sources" if isinstance(value, Routed) else "streams"
    given: Any = vars(value)[field]
    if not isinstance(given, list | tuple):
        raise ValueError(f"{name}.{field}: expected a list; got {type(given).__name__}")
    if not given:
        raise ValueError(f"{name}: expected at least one source; got none")
    if not isinstance(value, Routed) and any(not isinstance(x, list | tuple) or len(x) != 2 for x in given):
        raise ValueError(f"{name}.streams: expected pairs (factor, source); got {type(given[0]).__name__}")
    return list(value.sources)


def check_reference(options: Any) -> None:
    """What the definition does not do: autograd forms its gradients."""
    for name in ("grad_filter", "main_grad"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name}: expected None with backend='reference'; got a value")


def _check_alike(name: str, part: Teacher, first: Teacher) -> None:
    """Streams have the same token dimensions and vocabulary."""
    if part.lead != first.lead:
        raise ValueError(f"{name}: expected token dimensions {tuple(first.lead)}; got {tuple(part.lead)}")
    if part.vocab != first.vocab:
        raise ValueError(f"{name}: expected {first.vocab} columns of the first stream; got {part.vocab}")


def _check_factors(name: str, value: LogLinear | Mixture) -> None:
    device = value.sources[0].tensors[0].device
    numbers = 0.0
    for index, (factor, _) in enumerate(value.streams):
        here = f"{name}.streams[{index}] factor"
        if isinstance(factor, Tensor):
            check_rows(here, factor, value.lead, device, FLOATS)
            numbers = math.nan
        elif not isinstance(factor, int | float) or not -math.inf < factor < math.inf:
            raise ValueError(f"{here}: expected a finite number or a tensor; got {factor!r}")
        elif isinstance(value, Mixture) and factor < 0:
            raise ValueError(f"{here}: expected a weight of at least 0; got {factor!r}")
        else:
            numbers += factor
    if isinstance(value, Mixture) and abs(numbers - 1) > 1e-6:
        raise ValueError(f"{name}.streams: expected weights that sum to 1; got a sum of {numbers}")


def check_weight_is_used(student: Any, teacher: Any, weight: Tensor | None) -> None:
    """A head that no bare tensor needs is a mistake, not a spare."""
    if weight is not None and not any(isinstance(x, Tensor) for x in (student, teacher)):
        raise ValueError(
            "weight: expected None, since student and teacher are sources of their own; got a tensor"
        )


def common_vocab(student: Source, teacher: Teacher, vocab_size: int | None) -> int:
    """V, after checking that both sources have it (or at least `vocab_size`, which cuts padding off)."""
    if vocab_size is None:
        if student.vocab != teacher.vocab:
            raise ValueError(
                f"teacher: expected the student's vocabulary of {student.vocab} columns; got {teacher.vocab} "
                "(if one is padded, pass vocab_size=the tokenizer's size)"
            )
        return student.vocab
    smaller = min(student.vocab, teacher.vocab)
    if type(vocab_size) is not int or not 1 <= vocab_size <= smaller:
        raise ValueError(
            f"vocab_size: expected an int in [1, {smaller}], the smaller vocabulary; got {vocab_size}"
        )
    return vocab_size


def check_pair(student: Source, teacher: Teacher) -> None:
    """Same token dimensions, one device, and no gradient expected of the teacher."""
    if student.lead != teacher.lead:
        raise ValueError(
            f"teacher: expected the student's token dimensions {tuple(student.lead)}; "
            f"got {tuple(teacher.lead)}"
        )
    device = student.tensors[0].device
    for name, source in (*_parts("student", student), *_parts("teacher", teacher)):
        for field, tensor in vars(source).items():
            if isinstance(tensor, Tensor):
                check_device(f"{name}.{field}", tensor, device)
    for name, source in _parts("teacher", teacher):
        rows = source.hidden if isinstance(source, Hidden) else source.z
        if rows.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor without gradient (only the student is trained); got "
                "requires_grad=True: compute it under torch.no_grad() or detach it"
            )


def _parts(name: str, source: Teacher) -> Iterator[tuple[str, Source]]:
    """The hidden states and logits that a source is made of, with their names."""
    if isinstance(source, Hidden | Logits):
        yield name, source
        return
    field = "sources" if isinstance(source, Routed) else "streams"
    for index, part in enumerate(source.sources):
        yield from _parts(f"{name}.{field}[{index}]", part)


def check_options(options: Any, objective: Objective, student: Source, teacher: Teacher, vocab: int) -> None:
    """Everything in `LossOptions` but the objective and the vocabulary."""
    lead, device = student.lead, student.tensors[0].device
    check_rows("mask", options.mask, lead, device, (torch.bool,))
    _check_row_indices(options.rows, options.mask, lead, device)
    if not callable(options.token_weight):
        check_rows("token_weight", options.token_weight, lead, device, FLOATS)
    check_rows("token_ids", options.token_ids, lead, device, IDS)
    check_ids("token_ids", _that_count(options.token_ids, lead, options), 0, vocab)
    _check_support_ids(options, objective, lead, device, vocab)
    if isinstance(teacher, Routed):
        check_ids("teacher.index", _that_count(teacher.index, lead, options), 0, len(teacher.sources))
    check_positive("temperature", options.temperature)
    check_reduction(options.reduction, options.denominator)
    if options.workspace_bytes is not None:
        check_positive("workspace_bytes", options.workspace_bytes)
    _check_filter(options, student)
    _check_main_grad(options.main_grad, student)


def check_reduction(reduction: str, denominator: Any) -> None:
    """A known reduction, and a positive denominator with `"mean"` only."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if denominator is None:
        return
    if reduction != "mean":
        raise ValueError(f"denominator: expected None with reduction={reduction!r}; got {denominator}")
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1 or denominator.requires_grad:
            raise ValueError(
                "denominator: expected a number or a constant tensor of one element; got shape "
                f"{tuple(denominator.shape)}, requires_grad={denominator.requires_grad}"
            )
        if readable(denominator):
            check_positive("denominator", denominator.item())
    else:
        check_positive("denominator", denominator)


def _that_count(ids: Tensor | None, lead: torch.Size, options: Any) -> Tensor | None:
    """The ids of the tokens that count; what others have does not matter."""
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


def _check_hidden(name: str, source: Hidden) -> None:
    _check_floats(f"{name}.hidden", source.hidden, "[..., H]", dims=None)
    _check_floats(f"{name}.weight", source.weight, "[V, H]", dims=2)
    if source.hidden.shape[-1] != source.weight.shape[1]:
        raise ValueError(
            f"{name}.hidden: expected last dimension H = {source.weight.shape[1]} of weight "
            f"{tuple(source.weight.shape)}; got {tuple(source.hidden.shape)}"
            + (" (is the weight transposed?)" if source.hidden.shape[-1] == source.weight.shape[0] else "")
        )
    if source.bias is not None:
        _check_floats(f"{name}.bias", source.bias, "[V]", dims=1)
        if source.bias.shape[0] != source.vocab:
            raise ValueError(f"{name}.bias: expected shape ({source.vocab},); got {tuple(source.bias.shape)}")
    check_positive(f"{name}.logit_scale", source.logit_scale)
    if source.softcap is not None:
        check_positive(f"{name}.softcap", source.softcap)


def _check_floats(name: str, tensor: Any, shape: str, dims: int | None) -> None:
    if not isinstance(tensor, Tensor):
        hint = " (pass its .weight)" if isinstance(tensor, torch.nn.Module) else ""
        raise ValueError(f"{name}: expected a tensor {shape}; got {type(tensor).__name__}{hint}")
    if hasattr(tensor, "device_mesh"):
        raise ValueError(
            f"{name}: expected a plain tensor {shape}; got a DTensor: gather it with .full_tensor() first"
        )
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: expected a floating-point dtype; got {tensor.dtype}")
    if (dims is not None and tensor.dim() != dims) or tensor.dim() == 0:
        raise ValueError(f"{name}: expected shape {shape}; got {tuple(tensor.shape)}")
    if (dims is not None and tensor.numel() == 0) or tensor.shape[-1] == 0:
        raise ValueError(
            f"{name}: expected a non-empty {shape}; got {tuple(tensor.shape)} (a parameter sharded by ZeRO-3 "
            "is empty outside deepspeed.zero.GatheredParameters)"
        )

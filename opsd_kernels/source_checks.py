"""Checks of student and teacher: what they are made of, and that they belong together."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.checks import (
    FLOATS,
    IDS,
    check_device,
    check_ids,
    check_plain,
    check_rows,
    check_scale,
    is_finite,
    shown,
)
from opsd_kernels.known import Sampled
from opsd_kernels.known_checks import check_topk
from opsd_kernels.sources import (
    Hidden,
    Logits,
    LogLinear,
    Mixture,
    Routed,
    Several,
    Source,
    Target,
    Teacher,
    TopK,
)
from opsd_kernels.targets import target

STREAMS: dict[type, tuple[type, ...]] = {
    LogLinear: (Hidden, Logits),
    Mixture: (Hidden, Logits, LogLinear),
    Routed: (Hidden, Logits, LogLinear, Mixture),
    Target: (Hidden, Logits, LogLinear, Mixture),
    Several: (Hidden, Logits, LogLinear, Mixture, Target, TopK),
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
    if isinstance(value, Sampled):
        raise ValueError(
            f"{name}: expected a teacher with logits for a divergence; got Sampled log-probs, which are "
            "enough for an estimator alone"
        )
    if isinstance(value, TopK):
        check_topk(name, value)
        return value
    if not isinstance(value, LogLinear | Mixture | Routed | Target | Several):
        return as_source(name, value, weight)
    parts = _streams(name, value)
    if isinstance(value, LogLinear) and value.mix not in ("auto", "logits"):
        raise ValueError(f"{name}.mix: expected 'auto' or 'logits'; got {value.mix!r}")
    if isinstance(value, Target):
        target.check(value.build, value.options, given=1 + len(parts))
        _check_literals(f"{name}.options", value.options)
    for index, part in enumerate(parts):
        here = f"{name}.{_field(value)}[{index}]"
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
    elif isinstance(value, LogLinear | Mixture):
        _check_factors(name, value)
    return value


def _check_literals(name: str, options: Mapping[str, Any]) -> None:
    """What an operator's text can hold: finite numbers, strings, bools and None."""
    for key, value in options.items():
        if not is_finite(value) and not isinstance(value, bool | str | None):
            raise ValueError(
                f"{name}[{key!r}]: expected a finite number, a string or None; got {shown(value)}"
            )


def _field(value: Teacher) -> str:
    """Where a combined teacher has its sources."""
    return "streams" if isinstance(value, LogLinear | Mixture) else "sources"


def _streams(name: str, value: LogLinear | Mixture | Routed | Target | Several) -> list[Any]:
    """The sources of a combined teacher, if it has any and they are given as they should be."""
    field = _field(value)
    given: Any = vars(value)[field]
    if not isinstance(given, list | tuple):
        raise ValueError(f"{name}.{field}: expected a list; got {type(given).__name__}")
    if not given and not isinstance(value, Several):
        raise ValueError(f"{name}: expected at least one source; got none")
    if field == "streams" and any(not isinstance(x, list | tuple) or len(x) != 2 for x in given):
        raise ValueError(f"{name}.streams: expected pairs (factor, source); got {type(given[0]).__name__}")
    return list(value.sources)


def _check_alike(name: str, part: Teacher, first: Teacher) -> None:
    """Streams have the same token dimensions and vocabulary."""
    if part.lead != first.lead:
        raise ValueError(f"{name}: expected token dimensions {tuple(first.lead)}; got {tuple(part.lead)}")
    if not isinstance(part, TopK) and not isinstance(first, TopK) and part.vocab != first.vocab:
        raise ValueError(f"{name}: expected {first.vocab} columns of the first stream; got {part.vocab}")


def _check_factors(name: str, value: LogLinear | Mixture) -> None:
    device = value.sources[0].tensors[0].device
    numbers = 0.0
    for index, (factor, _) in enumerate(value.streams):
        here = f"{name}.streams[{index}] factor"
        if isinstance(factor, Tensor):
            check_rows(here, factor, value.lead, device, FLOATS)
            numbers = math.nan
        elif not is_finite(factor):
            raise ValueError(f"{here}: expected a finite number or a tensor; got {shown(factor)}")
        elif isinstance(value, Mixture) and factor < 0:
            raise ValueError(f"{here}: expected a weight of at least 0; got {factor!r}")
        else:
            numbers += factor
    if isinstance(value, Mixture) and abs(numbers - 1) > 1e-6:
        raise ValueError(f"{name}.streams: expected weights that sum to 1; got a sum of {numbers}")


def check_weight_is_used(sources: Sequence[Any], weight: Tensor | None) -> None:
    """A head that no bare tensor needs is a mistake, not a spare."""
    if weight is not None and not any(isinstance(x, Tensor) for x in sources):
        raise ValueError(
            "weight: expected None, since student and teacher are sources of their own; got a tensor"
        )


def common_vocab(student: Source, teacher: Teacher, vocab_size: int | None) -> int:
    """V, after checking that all sources have it (or at least `vocab_size`, which cuts padding off)."""
    vocabularies = [student.vocab, *[part.vocab for _, part in _parts("teacher", teacher)]]
    if vocab_size is None:
        others = [vocab for vocab in vocabularies if vocab != student.vocab]
        if others:
            raise ValueError(
                f"teacher: expected the student's vocabulary of {student.vocab} columns; got {others[0]} "
                "(if one is padded, pass vocab_size=the tokenizer's size)"
            )
        return student.vocab
    smaller = min(vocabularies)
    if type(vocab_size) is not int or not 1 <= vocab_size <= smaller:
        raise ValueError(
            f"vocab_size: expected an int in [1, {smaller}], the smaller vocabulary; got {vocab_size}"
        )
    return vocab_size


def check_pair(student: Source, teacher: Teacher) -> None:
    """Same token dimensions, one device, and no gradient expected of the teacher."""
    for _, source in _leaves("teacher", teacher):
        if student.lead != source.lead:
            raise ValueError(
                f"teacher: expected the student's token dimensions {tuple(student.lead)}; "
                f"got {tuple(source.lead)}"
            )
    device = student.tensors[0].device
    for name, source in (("student", student), *_leaves("teacher", teacher)):
        for field, tensor in vars(source).items():
            if isinstance(tensor, Tensor):
                check_device(f"{name}.{field}", tensor, device)
    for name, source in _leaves("teacher", teacher):
        rows = source.hidden if isinstance(source, Hidden) else source.tensors[-1]
        if rows.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor without gradient (only the student is trained); got "
                "requires_grad=True: compute it under torch.no_grad() or detach it"
            )
        if isinstance(source, TopK):
            check_ids(f"{name}.ids", source.ids, -1, student.vocab)  # -1 stands for none


def _parts(name: str, source: Teacher) -> Iterator[tuple[str, Source]]:
    """The hidden states and logits that a source is made of, with their names."""
    for label, leaf in _leaves(name, source):
        if not isinstance(leaf, TopK):
            yield label, leaf


def _leaves(name: str, source: Teacher) -> Iterator[tuple[str, Source | TopK]]:
    if isinstance(source, Hidden | Logits | TopK):
        yield name, source
        return
    for index, part in enumerate(source.sources):
        label = f"{name}.{_field(source)}[{index}]"
        yield from _leaves(label, part)


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
    check_scale(f"{name}.logit_scale", source.logit_scale)
    if source.softcap is not None:
        check_scale(f"{name}.softcap", source.softcap)


def _check_floats(name: str, tensor: Any, shape: str, dims: int | None) -> None:
    if not isinstance(tensor, Tensor):
        hint = " (pass its .weight)" if isinstance(tensor, torch.nn.Module) else ""
        raise ValueError(f"{name}: expected a tensor {shape}; got {type(tensor).__name__}{hint}")
    if hasattr(tensor, "device_mesh"):
        raise ValueError(
            f"{name}: expected a plain tensor {shape}; got a DTensor: gather it with .full_tensor() first"
        )
    check_plain(name, tensor)
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: expected a floating-point dtype; got {tensor.dtype}")
    if (dims is not None and tensor.dim() != dims) or tensor.dim() == 0:
        raise ValueError(f"{name}: expected shape {shape}; got {tuple(tensor.shape)}")
    if (dims is not None and tensor.numel() == 0) or tensor.shape[-1] == 0:
        raise ValueError(
            f"{name}: expected a non-empty {shape}; got {tuple(tensor.shape)} (a parameter sharded by ZeRO-3 "
            "is empty outside deepspeed.zero.GatheredParameters)"
        )

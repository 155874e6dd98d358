"""Sources and objectives as a list of tensors and a string, which is what PyTorch's operators can take."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

from torch import Tensor

from opsd_kernels.engine.parts import Dense, Gather, Parts
from opsd_kernels.objectives import Objective, Support
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


@dataclass(frozen=True)
class Options:
    """What an operator must know beside the tensors.

    Args:
        objective: the token loss.
        temperature: T of both distributions.
        workspace_bytes: budget for the two logits buffers, None for the device's default.
        backend: name of the backend, already chosen.
        grad_filter: eps of the column filter, or None.
        operand: name of the dtype to which the operands of matrix products are rounded (autocast), or None.
        weigher: handle of a function that weights tokens by their statistics, or None.
        shard: handle of the part of the vocabulary that this rank holds (`opsd_kernels.parallel`), or None.
        parts: of a recipe with several terms, what the engine evaluates; `objective` is then unused.
    """

    objective: Objective
    temperature: float
    workspace_bytes: int | None
    backend: str
    grad_filter: float | None = None
    operand: str | None = None
    weigher: int | None = None
    shard: int | None = None
    parts: Parts | None = None


def pack(student: Source, teacher: Teacher, options: Options) -> str:
    """Everything but the tensors, as the text of a Python literal."""
    parts = options.parts
    return repr(
        (
            _describe(student),
            _describe(teacher),
            _describe_objective(options.objective),
            None
            if parts is None
            else (
                tuple([(_describe_objective(x.objective), x.teacher, x.constant) for x in parts.dense]),
                tuple([(_describe_support(x.support), x.teacher) for x in parts.gathers]),
            ),
            (
                _text(options.temperature),
                options.workspace_bytes,
                options.backend,
                _text(options.grad_filter),
                options.operand,
                options.weigher,
                options.shard,
            ),
        )
    )


# Python 3.11's parser of literals fails now and then if two threads are in it at once.
_PARSING = Lock()


@lru_cache(maxsize=256)
def _literal(text: str) -> Any:
    with _PARSING:
        return ast.literal_eval(text)


def unpack(text: str, student: list[Tensor], teacher: list[Tensor]) -> tuple[Source, Teacher, Options]:
    """What was packed, over these tensors."""
    s, t, objective, parts, rest = _literal(text)
    temperature, workspace_bytes, backend, grad_filter, operand, weigher, shard = rest
    options = Options(
        _rebuild_objective(objective),
        float.fromhex(temperature),
        workspace_bytes,
        backend,
        _number(grad_filter),
        operand,
        weigher,
        shard,
        None if parts is None else _rebuild_parts(*parts),
    )
    return _rebuild(s, iter(student)), _rebuild(t, iter(teacher)), options


def _describe_objective(objective: Objective | None) -> tuple[Any, ...] | None:
    if objective is None:
        return None
    return (
        objective.divergence,
        _text(objective.beta),
        _text(objective.entry_clip),
        objective.clip_mode,
        _text(objective.token_clip),
        _describe_support(objective.support),
    )


def _describe_support(support: Support | None) -> tuple[Any, ...] | None:
    return None if support is None else (support.k, support.of, support.rest)


def _rebuild_objective(description: tuple[Any, ...]) -> Objective:
    divergence, beta, entry_clip, clip_mode, token_clip, support = description
    clips = _number(entry_clip), clip_mode, _number(token_clip)
    return Objective(divergence, float.fromhex(beta), *clips, _rebuild_support(support))


def _rebuild_support(description: tuple[Any, ...] | None) -> Support | None:
    return None if description is None else Support(*description)


def _rebuild_parts(dense: tuple[Any, ...], gathers: tuple[Any, ...]) -> Parts:
    return Parts(
        tuple([Dense(None if x is None else _rebuild_objective(x), *rest) for x, *rest in dense]),
        tuple([Gather(_rebuild_support(x), teacher) for x, teacher in gathers]),
    )


def _text(value: float | None) -> str | None:
    """A float as exact text, by the one conversion that torch.compile follows for symbolic floats."""
    return None if value is None else float(value).hex()


def _number(text: str | None) -> float | None:
    return None if text is None else float.fromhex(text)


def _describe(source: Any) -> tuple[Any, ...]:
    """The source without its tensors; a factor that is a tensor becomes None."""
    if isinstance(source, Hidden):
        return ("hidden", source.bias is not None, _text(source.logit_scale), _text(source.softcap))
    if isinstance(source, Logits):
        return ("logits",)
    if isinstance(source, TopK):
        return ("topk", _text(source.temperature))
    if isinstance(source, Routed | Several):
        kind = "routed" if isinstance(source, Routed) else "several"
        return (kind, tuple([_describe(inner) for inner in source.sources]))
    if isinstance(source, Target):
        inner = tuple([_describe(part) for part in source.sources])
        return ("target", source.build, inner, tuple(source.options.items()))
    factors = tuple([None if isinstance(factor, Tensor) else _text(factor) for factor, _ in source.streams])
    inner = tuple([_describe(stream) for _, stream in source.streams])
    return (
        ("loglinear", factors, inner, source.mix)
        if isinstance(source, LogLinear)
        else ("mixture", factors, inner)
    )


def _rebuild(description: tuple[Any, ...], tensors: Iterator[Tensor]) -> Any:
    kind, *rest = description
    if kind == "hidden":
        has_bias, logit_scale, softcap = rest
        hidden, weight = next(tensors), next(tensors)
        bias = next(tensors) if has_bias else None
        return Hidden(hidden, weight, bias, float.fromhex(logit_scale), _number(softcap))
    if kind == "logits":
        return Logits(next(tensors))
    if kind == "topk":
        return TopK(next(tensors), next(tensors), float.fromhex(rest[0]))
    if kind == "several":
        return Several([_rebuild(inner, tensors) for inner in rest[0]])
    if kind == "target":
        build, inner, options = rest
        return Target(build, [_rebuild(part, tensors) for part in inner], dict(options))
    if kind == "routed":
        index = next(tensors)
        return Routed([_rebuild(inner, tensors) for inner in rest[0]], index)
    factors = [next(tensors) if factor is None else float.fromhex(factor) for factor in rest[0]]
    streams = list(zip(factors, [_rebuild(inner, tensors) for inner in rest[1]], strict=True))
    return LogLinear(streams, mix=rest[2]) if kind == "loglinear" else Mixture(streams)

"""Sources and objectives as a list of tensors and a string, which is what PyTorch's operators can take."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

from torch import Tensor

from opsd_kernels.objectives import Objective, Support
from opsd_kernels.sources import Hidden, Logits, LogLinear, Mixture, Routed, Source, Teacher


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
    """

    objective: Objective
    temperature: float
    workspace_bytes: int | None
    backend: str
    grad_filter: float | None = None
    operand: str | None = None
    weigher: int | None = None


def pack(student: Source, teacher: Teacher, options: Options) -> str:
    """Everything but the tensors, as the text of a Python literal."""
    objective, support = options.objective, options.objective.support
    return repr(
        (
            _describe(student),
            _describe(teacher),
            (
                objective.divergence,
                _text(objective.beta),
                _text(objective.entry_clip),
                objective.clip_mode,
                _text(objective.token_clip),
            ),
            None if support is None else (support.k, support.of, support.rest),
            (
                _text(options.temperature),
                options.workspace_bytes,
                options.backend,
                _text(options.grad_filter),
                options.operand,
                options.weigher,
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
    s, t, (divergence, beta, entry_clip, clip_mode, token_clip), support, rest = _literal(text)
    objective = Objective(
        divergence,
        float.fromhex(beta),
        _number(entry_clip),
        clip_mode,
        _number(token_clip),
        None if support is None else Support(*support),
    )
    temperature, workspace_bytes, backend, grad_filter, operand, weigher = rest
    options = Options(
        objective,
        float.fromhex(temperature),
        workspace_bytes,
        backend,
        _number(grad_filter),
        operand,
        weigher,
    )
    return _rebuild(s, iter(student)), _rebuild(t, iter(teacher)), options


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
    if isinstance(source, Routed):
        return ("routed", tuple([_describe(inner) for inner in source.sources]))
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
    if kind == "routed":
        index = next(tensors)
        return Routed([_rebuild(inner, tensors) for inner in rest[0]], index)
    factors = [next(tensors) if factor is None else float.fromhex(factor) for factor in rest[0]]
    streams = list(zip(factors, [_rebuild(inner, tensors) for inner in rest[1]], strict=True))
    return LogLinear(streams, mix=rest[2]) if kind == "loglinear" else Mixture(streams)

"""Wrong teachers of several sources, supports, rows and gradient options: what the ValueErrors say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from opsd_kernels import (
    Hidden,
    Logits,
    LogLinear,
    Mixture,
    Objective,
    Routed,
    Support,
    loss,
    loss_and_stats,
    token_stats,
)
from wrong_calls import H_S, H_T, IDS, MASK, META, W, Z, call_of, raises

ONE, TWO, TEN = Hidden(H_T, W), Logits(Z), Logits(Z[..., :10])
INDEX = torch.tensor([[0, 1, 0], [1, 1, 0]])
SHARE = torch.full((2, 3), 0.5)


def _log_linear(*factors: Any, sources: Any = (ONE, TWO), **fields: Any) -> dict[str, Any]:
    return call_of(teacher=LogLinear(list(zip(factors, sources, strict=True)), **fields))


def _mixture(*factors: Any, sources: Any = (ONE, TWO)) -> dict[str, Any]:
    return call_of(teacher=Mixture(list(zip(factors, sources, strict=True))))


def _routed(*sources: Any, index: Any = INDEX) -> dict[str, Any]:
    return call_of(teacher=Routed(list(sources), index))


COMBINED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "combined student": (
        call_of(student=LogLinear([(1, ONE)])),
        ("student", "Hidden or Logits", "LogLinear"),
    ),
    "no streams": (_log_linear(sources=()), ("teacher", "at least one source", "none")),
    "no sources": (_routed(), ("teacher", "at least one source", "none")),
    "mix": (_log_linear(1, 1, mix="hidden"), ("teacher.mix", "'auto' or 'logits'", "'hidden'")),
    "a bare tensor as a stream": (
        _log_linear(1, 1, sources=(ONE, H_T)),
        ("teacher.streams[1]", "Hidden, Logits", "Tensor"),
    ),
    "log-linear in log-linear": (
        _log_linear(1, sources=[LogLinear([(1, ONE)])]),
        ("teacher.streams[0]", "Hidden, Logits", "LogLinear"),
    ),
    "mixture in a mixture": (
        _mixture(1.0, sources=[Mixture([(1.0, ONE)])]),
        ("teacher.streams[0]", "Hidden, Logits, LogLinear", "Mixture"),
    ),
    "routed in a mixture": (
        _mixture(1.0, sources=[Routed([ONE, TWO], INDEX)]),
        ("teacher.streams[0]", "Hidden, Logits, LogLinear", "Routed"),
    ),
    "routed in routed": (
        _routed(ONE, Routed([ONE, TWO], INDEX)),
        ("teacher.sources[1]", "Hidden, Logits, LogLinear, Mixture", "Routed"),
    ),
    "tokens of a stream": (
        _log_linear(1, 1, sources=(ONE, Logits(Z[:1]))),
        ("teacher.streams[1]", "(2, 3)", "(1, 3)"),
    ),
    "columns of a stream": (_mixture(0.5, 0.5, sources=(ONE, TEN)), ("teacher.streams[1]", "11", "10")),
    "columns of a routed source": (_routed(ONE, TEN), ("teacher.sources[1]", "11 columns", "10")),
    "tokens of all streams": (
        _log_linear(1, sources=[Logits(Z[:1])]),
        ("teacher", "student's token dimensions (2, 3)", "(1, 3)"),
    ),
    "columns of all streams": (_log_linear(1, sources=[TEN]), ("teacher", "11 columns", "10", "vocab_size")),
    "width of a stream": (
        _log_linear(1, 1, sources=(ONE, Hidden(H_T[..., :7], W))),
        ("teacher.streams[1].hidden", "H = 8", "(2, 3, 7)"),
    ),
    "integers in a nested stream": (
        _routed(TWO, Mixture([(1.0, LogLinear([(1, Logits(Z.long()))]))])),
        ("teacher.sources[1].streams[0].streams[0].z", "floating-point", "torch.int64"),
    ),
    "a stream with gradient": (
        _routed(ONE, LogLinear([(1, ONE), (1, Hidden(H_T.clone().requires_grad_(), W))])),
        ("teacher.sources[1].streams[1]", "without gradient", "requires_grad=True", "detach"),
    ),
    "device of a stream": (
        _mixture(0.5, 0.5, sources=(ONE, Hidden(H_T, W.to("meta")))),
        ("teacher.streams[1].weight", "cpu", "meta"),
    ),
    "factor is text": (_log_linear(1, "2"), ("teacher.streams[1] factor", "finite number", "'2'")),
    "factor is nothing": (_log_linear(None, 1), ("teacher.streams[0] factor", "number", "None")),
    "infinite factor": (_log_linear(float("inf"), 1), ("teacher.streams[0] factor", "finite", "inf")),
    "NaN factor": (_log_linear(1, float("nan")), ("teacher.streams[1] factor", "finite", "nan")),
    "factor shape": (_log_linear(SHARE[0], 1), ("teacher.streams[0] factor", "(2, 3)", "(3,)")),
    "factor dtype": (_log_linear(INDEX, 1), ("teacher.streams[0] factor", "torch.float32", "torch.int64")),
    "factor device": (_log_linear(SHARE.to("meta"), 1), ("teacher.streams[0] factor", "cpu", "meta")),
    "factor with gradient": (
        _mixture(SHARE.clone().requires_grad_(), 0.5),
        ("teacher.streams[0] factor", "without gradient", "requires_grad=True"),
    ),
    "weights above 1": (_mixture(0.5, 0.6), ("teacher.streams", "sum to 1", "1.1")),
    "weights below 1": (_mixture(0.5, 0.4), ("teacher.streams", "sum to 1", "0.9")),
    "weight below 0": (_mixture(1.5, -0.5), ("teacher.streams[1] factor", "at least 0", "-0.5")),
    "weight below 0 beside a tensor": (
        _mixture(SHARE, -0.5),
        ("teacher.streams[1] factor", "at least 0", "-0.5"),
    ),
    "index above": (_routed(ONE, TWO, index=INDEX + 1), ("teacher.index", "[0, 2)", "[1, 2]")),
    "index below": (_routed(ONE, TWO, index=INDEX - 1), ("teacher.index", "[0, 2)", "[-1, 0]")),
    "index shape": (_routed(ONE, TWO, index=INDEX[0]), ("teacher.index", "(2, 3)", "(3,)")),
    "index of floats": (_routed(ONE, TWO, index=SHARE), ("teacher.index", "torch.int64", "torch.float32")),
    "index of flags": (_routed(ONE, TWO, index=MASK), ("teacher.index", "torch.int64", "torch.bool")),
    "index is a list": (_routed(ONE, TWO, index=[0]), ("teacher.index", "tensor", "list")),
    "index device": (_routed(ONE, TWO, index=INDEX.to("meta")), ("teacher.index", "cpu", "meta")),
}
GIVEN = Objective(support=Support(None, "given"))
ENTRIES = torch.tensor([0, 10, -1, 4]).expand(2, 3, 4)


def _given(ids: Any, **options: Any) -> dict[str, Any]:
    return call_of(objective=GIVEN, support_ids=ids, **options)


SELECTED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "rows and mask": (call_of(rows=IDS[0], mask=MASK), ("rows", "None beside a mask", "both")),
    "rows shape": (call_of(rows=IDS), ("rows", "shape [n]", "(2, 3)")),
    "rows are a list": (call_of(rows=[0, 1]), ("rows", "integer indices", "list")),
    "rows of floats": (call_of(rows=torch.ones(2)), ("rows", "integer indices", "(2,)")),
    "rows of flags": (call_of(rows=MASK.flatten()), ("rows", "integer indices", "(6,)")),
    "rows above": (call_of(rows=torch.tensor([0, 6])), ("rows", "[0, 6)", "[0, 6]")),
    "rows below": (call_of(rows=torch.tensor([3, -1])), ("rows", "[0, 6)", "[-1, 3]")),
    "rows twice": (call_of(rows=torch.tensor([3, 1, 3])), ("rows", "each index once", "repeatedly")),
    "rows device": (call_of(rows=torch.zeros(2, **META).long()), ("rows", "cpu", "meta")),  # type: ignore[call-overload]
    "no entries": (call_of(objective=GIVEN), ("support_ids", "[..., K]", "'given'", "None")),
    "entries without a support": (call_of(support_ids=ENTRIES), ("support_ids", "None", "a tensor")),
    "entries of a support of its own": (
        call_of(support_ids=ENTRIES, objective=Objective(support=Support(3, "union"))),
        ("support_ids", "None", "a tensor"),
    ),
    "entries are a list": (_given([[1]]), ("support_ids", "(2, 3, K)", "list")),
    "entries without K": (_given(IDS), ("support_ids", "(2, 3, K)", "(2, 3)")),
    "K of 0": (_given(ENTRIES[..., :0]), ("support_ids", "(2, 3, K)", "(2, 3, 0)")),
    "entries of other tokens": (_given(ENTRIES[:1]), ("support_ids", "(2, 3, 4)", "(1, 3, 4)")),
    "entries of floats": (_given(ENTRIES.float()), ("support_ids", "torch.int64", "torch.float32")),
    "entries above": (_given(ENTRIES + 1), ("support_ids", "[-1, 11)", "[0, 11]")),
    "entries below": (_given(ENTRIES - 1), ("support_ids", "[-1, 11)", "[-2, 9]")),
    "entries beyond the real vocabulary": (
        _given(ENTRIES, vocab_size=10),
        ("support_ids", "[-1, 10)", "[-1, 10]"),
    ),
    "device of the entries": (_given(ENTRIES.to("meta")), ("support_ids", "cpu", "meta")),
}
TRAINED = W.clone().requires_grad_()
SUM = torch.zeros(11, 8)


def _main_grad(value: Any, weight: Any = TRAINED) -> dict[str, Any]:
    return call_of(weight=weight, main_grad=value)


GRADIENTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "filter of 0": (call_of(grad_filter=0.0), ("grad_filter", "above 0", "0.0")),
    "filter is text": (call_of(grad_filter="1e-4"), ("grad_filter", "number", "'1e-4'")),
    "NaN filter": (call_of(grad_filter=float("nan")), ("grad_filter", "finite", "nan")),
    "filter of logits": (
        call_of(student=Logits(Z), grad_filter=1e-4),
        ("grad_filter", "None for logits", "0.0001"),
    ),
    "filter of token losses": (
        call_of(grad_filter=1e-4, reduction="none"),
        ("grad_filter", "None with reduction='none'", "0.0001"),
    ),
    "sum for a frozen head": (_main_grad(SUM, weight=W), ("main_grad", "None without a head", "tensor")),
    "sum for logits": (
        call_of(student=Logits(Z), main_grad=SUM),
        ("main_grad", "None without a head", "tensor"),
    ),
    "sum of another shape": (_main_grad(SUM[:10]), ("main_grad", "(11, 8)", "(10, 8)")),
    "sum in bf16": (_main_grad(SUM.bfloat16()), ("main_grad", "torch.float32", "torch.bfloat16")),
    "sum is a list": (_main_grad([0.0]), ("main_grad", "tensor", "list")),
    "sum on another device": (_main_grad(SUM.to("meta")), ("main_grad", "cpu", "meta")),
    "sum with gradient": (
        _main_grad(SUM.clone().requires_grad_()),
        ("main_grad", "without gradient", "=True"),
    ),
    "transposed sum": (_main_grad(torch.zeros(8, 11).T), ("main_grad", "contiguous", "(1, 11)")),
    "sum for a head in fp16": (
        _main_grad(SUM, weight=W.half().requires_grad_()),
        ("main_grad", "fp32 or bf16", "torch.float16"),
    ),
    "sum for a head in fp64": (
        _main_grad(SUM, weight=W.double().requires_grad_()),
        ("main_grad", "fp32 or bf16", "torch.float64"),
    ),
}
SUPPORTS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "owner": (lambda: Support(3, "both"), ("of", "student, teacher, union", "'both'")),
    "rest": (lambda: Support(3, "student", "zero"), ("rest", "tail, renormalise, drop", "'zero'")),
    "k of 0": (lambda: Support(0), ("k", "at least 1", "0")),
    "k is a float": (lambda: Support(2.0), ("k", "an int", "2.0")),  # type: ignore[arg-type]
    "k is a flag": (lambda: Support(True), ("k", "an int", "True")),
    "no k": (lambda: Support(None, "union"), ("k", "an int of at least 1", "None")),
    "k of given entries": (lambda: Support(3, "given"), ("k", "None with of='given'", "3")),
}

BOTH = [*COMBINED.values(), *SELECTED.values()]


@pytest.mark.parametrize(("call", "parts"), [*BOTH, *GRADIENTS.values()])
def test_loss(call: dict[str, Any], parts: tuple[str, ...]) -> None:
    raises(lambda: loss(**call), parts)
    raises(lambda: loss_and_stats(**call), parts)


@pytest.mark.parametrize(("call", "parts"), BOTH)
def test_token_stats(call: dict[str, Any], parts: tuple[str, ...]) -> None:
    raises(lambda: token_stats(**call), parts)


@pytest.mark.parametrize(("call", "parts"), SUPPORTS.values(), ids=SUPPORTS)
def test_supports(call: Callable[[], Any], parts: tuple[str, ...]) -> None:
    raises(call, parts)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_what_looks_wrong_and_is_not(backend: str) -> None:
    """Narrow integers, no rows at all, weights that are tensors, a wider teacher's padding."""
    loss(H_S, H_T, W, rows=torch.tensor([5, 0], dtype=torch.int16), backend=backend)
    loss(H_S, H_T, W, rows=IDS[0, :0], backend=backend)
    thirds = Mixture([(1 / 3, ONE), (1 / 3, TWO), (1 / 3, ONE)])
    for teacher in (thirds, Mixture([(SHARE, ONE), (0.5, TWO)]), LogLinear([(-1, ONE), (SHARE.half(), TWO)])):
        loss(H_S, Routed([teacher, TWO], INDEX.to(torch.uint8)), W, backend=backend)
    loss(H_S, Logits(torch.cat((Z, Z), -1)), W, vocab_size=11, backend=backend)
    loss(**_given(ENTRIES.int(), backend=backend))
    loss(**_given(torch.full((2, 3, 1), -1), backend=backend))

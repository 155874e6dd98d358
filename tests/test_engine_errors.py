"""Every wrong input is a ValueError that names the argument, says what was expected and shows what came."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from opsd_kernels import Hidden, Logits, Objective, get_objective, loss, token_stats
from wrong_calls import BIAS, H_S, H_T, IDS, MASK, META, SHARDED, FakeDTensor, W, Z
from wrong_calls import call_of as _call
from wrong_calls import raises as _raises


def _student(**fields: Any) -> dict[str, Any]:
    return _call(student=Hidden(**{"hidden": H_S, "weight": W, **fields}))


# What is wrong: the call, and what the message must hold: the argument, what was expected, what came.
SOURCES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no head": (_call(weight=None), ("weight", "[V, H]", "None", "Logits")),
    "no head for the teacher": (_call(student=Logits(Z), weight=None), ("weight", "`teacher`", "None")),
    "a head that nobody needs": (
        _call(student=Logits(Z), teacher=Logits(Z)),
        ("weight", "None, since student and teacher are sources", "tensor"),
    ),
    "a list": (_call(student=[1.0]), ("student", "tensor, Hidden or Logits", "list")),
    "no teacher": (_call(teacher=None), ("teacher", "tensor, Hidden or Logits", "NoneType")),
    "integers": (_call(student=IDS), ("student.hidden", "floating-point", "torch.int64")),
    "integer head": (_call(weight=torch.ones(11, 8).long()), ("weight", "floating-point", "torch.int64")),
    "integer logits": (_call(teacher=Logits(Z.long())), ("teacher.z", "floating-point", "torch.int64")),
    "logits are no tensor": (
        _call(teacher=Logits(None)),  # type: ignore[arg-type]
        ("teacher.z", "tensor [..., V]", "NoneType"),
    ),
    "a number": (_call(student=torch.tensor(1.0)), ("student.hidden", "[..., H]", "()")),
    "width": (_call(student=H_S[..., :7]), ("student.hidden", "H = 8", "(2, 3, 7)")),
    "teacher's width": (_call(teacher=H_T[..., :7]), ("teacher.hidden", "H = 8", "(2, 3, 7)")),
    "flat head": (_call(weight=W.flatten()), ("weight", "[V, H]", "(88,)")),
    "empty head": (_call(weight=torch.empty(0)), ("weight", "[V, H]", "(0,)")),
    "ZeRO-3 head": (_call(weight=torch.empty(0, 8)), ("weight", "non-empty", "(0, 8)", "ZeRO-3")),
    "empty logits": (_call(student=Logits(Z[..., :0])), ("student.z", "non-empty", "(2, 3, 0)")),
    "rows": (_call(teacher=H_T[:1]), ("teacher", "(2, 3)", "(1, 3)")),
    "flattened rows": (_call(teacher=H_T.flatten(0, 1)), ("teacher", "(2, 3)", "(6,)")),
    "vocabularies": (_call(teacher=Logits(Z[..., :10])), ("teacher", "11 columns", "10", "vocab_size")),
    "DTensor": (_call(student=SHARDED), ("student.hidden", "plain tensor", "DTensor", "full_tensor")),
    "DTensor head": (_call(weight=W.as_subclass(FakeDTensor)), ("weight", "plain tensor", "DTensor")),
    "teacher with gradient": (
        _call(teacher=H_T.clone().requires_grad_()),
        ("teacher", "without gradient", "requires_grad=True", "detach"),
    ),
    "teacher's logits with gradient": (
        _call(teacher=Logits(Z.clone().requires_grad_())),
        ("teacher", "without gradient", "requires_grad=True"),
    ),
    "device of the head": (_call(weight=W.to("meta")), ("student.weight", "cpu", "meta")),
    "device of the teacher": (_call(teacher=H_T.to("meta")), ("teacher.hidden", "cpu", "meta")),
    "device of the bias": (_student(bias=BIAS.to("meta")), ("student.bias", "cpu", "meta")),
    "bias shape": (_student(bias=BIAS[:10]), ("student.bias", "(11,)", "(10,)")),
    "bias dimensions": (_student(bias=BIAS[None]), ("student.bias", "[V]", "(1, 11)")),
    "bias dtype": (_student(bias=BIAS.long()), ("student.bias", "floating-point", "torch.int64")),
    "soft-cap": (_student(softcap=0.0), ("student.softcap", "above 0", "0.0")),
    "infinite soft-cap": (_student(softcap=float("inf")), ("student.softcap", "finite", "inf")),
    "logit scale": (_student(logit_scale=-1.0), ("student.logit_scale", "above 0", "-1.0")),
    "NaN logit scale": (_student(logit_scale=float("nan")), ("student.logit_scale", "finite", "nan")),
}
OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mask shape": (_call(mask=MASK[0]), ("mask", "(2, 3)", "(3,)")),
    "mask of numbers": (_call(mask=MASK.float()), ("mask", "torch.bool", "torch.float32")),
    "mask of integers": (_call(mask=MASK.long()), ("mask", "torch.bool", "torch.int64")),
    "mask of bytes": (_call(mask=MASK.byte()), ("mask", "torch.bool", "torch.uint8")),
    "mask is a list": (_call(mask=[True]), ("mask", "tensor or None", "list")),
    "device of the mask": (_call(mask=MASK.to("meta")), ("mask", "cpu", "meta")),
    "ids of another shape": (_call(token_ids=IDS[:, :2]), ("token_ids", "(2, 3)", "(2, 2)")),
    "ids of floats": (_call(token_ids=IDS.float()), ("token_ids", "torch.int64", "torch.float32")),
    "ids outside": (_call(token_ids=IDS + 11), ("token_ids", "[0, 11)", "[11, 11]")),
    "ids below": (_call(token_ids=IDS - 100), ("token_ids", "[0, 11)", "-100")),
    "ids outside the real vocabulary": (
        _call(token_ids=IDS + 10, vocab_size=10),
        ("token_ids", "[0, 10)", "[10, 10]"),
    ),
    "temperature 0": (_call(temperature=0.0), ("temperature", "above 0", "0.0")),
    "temperature below 0": (_call(temperature=-1), ("temperature", "above 0", "-1")),
    "infinite temperature": (_call(temperature=float("inf")), ("temperature", "finite", "inf")),
    "temperature is text": (_call(temperature="1"), ("temperature", "number", "'1'")),
    "temperature is true": (_call(temperature=True), ("temperature", "number", "True")),
    "vocab_size 0": (_call(vocab_size=0), ("vocab_size", "[1, 11]", "0")),
    "vocab_size too large": (_call(vocab_size=12), ("vocab_size", "[1, 11]", "12")),
    "vocab_size of the smaller": (
        _call(teacher=Logits(Z[..., :9]), vocab_size=10),
        ("vocab_size", "[1, 9]", "10"),
    ),
    "vocab_size is a flag": (_call(vocab_size=True), ("vocab_size", "int", "True")),
    "vocab_size is a float": (_call(vocab_size=5.0), ("vocab_size", "int", "5.0")),
    "workspace": (_call(workspace_bytes=0), ("workspace_bytes", "above 0", "0")),
    "backend": (_call(backend="cudnn"), ("backend", "auto", "reference", "'cudnn'")),
    "objective": (
        _call(objective="forward_k"),
        ("objective", "jsd", "'forward_k'", "did you mean 'forward_kl'"),
    ),
    "objective is none": (_call(objective=None), ("objective", "opsd", "None")),
}
LOSS_ONLY: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "weight shape": (_call(token_weight=torch.ones(6)), ("token_weight", "(2, 3)", "(6,)")),
    "weight dtype": (_call(token_weight=IDS), ("token_weight", "torch.float32", "torch.int64")),
    "weight is a mask": (_call(token_weight=MASK), ("token_weight", "torch.float32", "torch.bool")),
    "weight with gradient": (
        _call(token_weight=torch.ones(2, 3, requires_grad=True)),
        ("token_weight", "without gradient", "requires_grad=True", "detach"),
    ),
    "device of the weight": (_call(token_weight=torch.ones(2, 3, **META)), ("token_weight", "cpu", "meta")),  # type: ignore[call-overload]
    "reduction": (_call(reduction="avg"), ("reduction", "mean, sum, none", "'avg'")),
    "denominator of a sum": (_call(reduction="sum", denominator=3), ("denominator", "None", "3")),
    "denominator of none": (_call(reduction="none", denominator=3.0), ("denominator", "None", "3.0")),
    "denominator 0": (_call(denominator=0), ("denominator", "above 0", "0")),
    "denominator is text": (_call(denominator="3"), ("denominator", "number", "'3'")),
    "denominator tensor of 0": (_call(denominator=torch.zeros(())), ("denominator", "above 0", "0.0")),
    "NaN denominator": (_call(denominator=torch.full((1,), torch.nan)), ("denominator", "finite", "nan")),
    "two denominators": (_call(denominator=torch.ones(2)), ("denominator", "one element", "(2,)")),
    "trained denominator": (
        _call(denominator=torch.ones((), requires_grad=True)),
        ("denominator", "constant", "=True"),
    ),
}
OBJECTIVES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "divergence": (lambda: Objective("kl"), ("divergence", "forward_kl", "'kl'")),
    "beta above 1": (lambda: Objective("jsd", beta=1.1), ("beta", "[0, 1]", "1.1")),
    "beta below 0": (lambda: Objective("jsd", beta=-0.1), ("beta", "[0, 1]", "-0.1")),
    "beta of a formula without": (lambda: Objective("forward_kl", 0.3), ("beta", "forward_kl", "got 0.3")),
    "beta of total variation": (
        lambda: Objective("total_variation", 1),
        ("beta", "total_variation, whose formula has no beta", "got 1"),
    ),
    "NaN beta": (lambda: Objective("jsd", beta=float("nan")), ("beta", "[0, 1]", "nan")),
    "beta is text": (lambda: Objective("jsd", beta="x"), ("beta", "[0, 1]", "'x'")),  # type: ignore[arg-type]
    "skew forward KL to the teacher itself": (
        lambda: Objective("skew_forward", beta=1),
        ("beta", "[0, 1);", "got 1"),
    ),
    "skew reverse KL to the student itself": (
        lambda: Objective("skew_reverse", beta=0.0),
        ("beta", "(0, 1];", "got 0.0"),
    ),
    "the same detached": (lambda: Objective("skew_reverse_sg", beta=0), ("beta", "(0, 1];", "got 0")),
    "alpha 0": (lambda: Objective("alpha", beta=0.0), ("beta", "(0, 1);", "got 0.0")),
    "alpha 1": (lambda: Objective("alpha", beta=1.0), ("beta", "(0, 1);", "got 1.0")),
    "alpha above 1": (lambda: Objective("alpha", beta=1.5), ("beta", "(0, 1);", "got 1.5")),
    "clip is text": (lambda: Objective(entry_clip="1"), ("entry_clip", "above 0", "'1'")),  # type: ignore[arg-type]
    "a list": (lambda: get_objective(["jsd"]), ("objective", "opsd", "['jsd']")),  # type: ignore[arg-type]
    "entry clip": (lambda: Objective(entry_clip=0.0), ("entry_clip", "above 0", "0.0")),
    "NaN entry clip": (lambda: Objective(entry_clip=float("nan")), ("entry_clip", "above 0", "nan")),
    "token clip": (lambda: Objective(token_clip=-1.0), ("token_clip", "above 0", "-1.0")),
    "clip mode": (lambda: Objective(clip_mode="hard"), ("clip_mode", "zero, scale, ratio", "'hard'")),
    "name": (lambda: get_objective("jsb"), ("objective", "'jsb'", "did you mean 'jsd'")),
}


@pytest.mark.parametrize(("call", "parts"), [*SOURCES.values(), *OPTIONS.values(), *LOSS_ONLY.values()])
def test_loss(call: dict[str, Any], parts: tuple[str, ...]) -> None:
    _raises(lambda: loss(**call), parts)


@pytest.mark.parametrize(("call", "parts"), [*SOURCES.values(), *OPTIONS.values()])
def test_token_stats(call: dict[str, Any], parts: tuple[str, ...]) -> None:
    _raises(lambda: token_stats(**call), parts)


@pytest.mark.parametrize(("call", "parts"), OBJECTIVES.values(), ids=OBJECTIVES)
def test_objectives(call: Callable[[], Any], parts: tuple[str, ...]) -> None:
    _raises(call, parts)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_what_looks_wrong_and_is_not(backend: str) -> None:
    """Ids of masked tokens may be anything (-100, as labels have it); a shared head may be trained."""
    ids = torch.where(torch.arange(6).reshape(2, 3) > 1, IDS, -100)
    loss(H_S, H_T, W, mask=ids >= 0, token_ids=ids, backend=backend)
    token_stats(H_S, H_T, W, mask=ids >= 0, token_ids=ids.int(), backend=backend)
    loss(H_S, H_T, W.clone().requires_grad_(), temperature=2, denominator=torch.tensor([3]), backend=backend)
    loss(**_call(workspace_bytes=2e9, vocab_size=11, backend=backend))

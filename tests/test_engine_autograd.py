"""The engine as an autograd function, and what it costs: GEMMs, rows and memory as PyTorch runs them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from opsd_kernels import loss, token_stats
from opsd_kernels.testing import (
    Case,
    evaluate,
    hidden_case,
    hidden_sources,
    logits_case,
    relative_error,
    tensors_of,
    upstream_of,
    with_gradient,
)
from recorder import Recorder

REDUCTIONS = ("mean", "sum", "none")
N, V, H, CHUNK = 31, 53, 7, 8  # distinct primes: a dimension tells what it is; 31 rows are 4 chunks of 8
WORKSPACE = 2 * CHUNK * V * 4


def _run(case: Case, trained: tuple[str, ...] = ("hidden", "weight", "bias")) -> Recorder:
    """A forward and, if anything is trained, a backward under the recorder."""
    leaves: dict[str, Any] = {name: x.detach().clone() for name, x in tensors_of(case.student).items()}
    for name in trained:
        if name in leaves:
            leaves[name].requires_grad_()
    student = replace(case.student, **leaves)
    with Recorder() as recorder:
        value = loss(student, case.teacher, **case.options)
        if trained:
            value.backward(upstream_of(value))
    return recorder


# ---- gradients go where they should


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_backward_may_run_twice_and_touches_nothing(kind: str, reduction: str) -> None:
    case = hidden_case(N, V, H, bias=True, softcap=5.0) if kind == "hidden" else logits_case(N, V)
    case = case.to(torch.float32).having(reduction=reduction, workspace_bytes=WORKSPACE)
    student, leaves = with_gradient(case.student)
    kept = [
        (x, x.detach().clone()) for source in (student, case.teacher) for x in tensors_of(source).values()
    ]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(student, case.teacher, **case.options)
    first, second = upstream_of(value), -2 * upstream_of(value).flip(0) if value.dim() else torch.tensor(0.3)
    for upstream in (first, second):
        gradients = torch.autograd.grad(value, list(leaves.values()), upstream, retain_graph=True)
        alone = evaluate(loss, case, upstream)
        for name, gradient in zip(leaves, gradients, strict=True):
            assert torch.equal(gradient, alone.gradients[name])
            gradient.zero_()  # the caller's to change: nothing of it is used again
    assert len(kept) > 2
    for tensor, copy in kept:
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_derivative_is_an_error(reduction: str) -> None:
    case = hidden_case(N, V, H).to(torch.float32).having(reduction=reduction)
    student, leaves = with_gradient(case.student)
    for scale in (1.0, torch.ones((), requires_grad=True)):
        value = scale * loss(student, case.teacher, **case.options).sum()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(value, [leaves["hidden"]], create_graph=True)


def test_an_input_changed_before_the_backward_is_an_error() -> None:
    """The per-token loss reads its inputs again in the backward."""
    case = hidden_case(N, V, H).to(torch.float32).having(reduction="none")
    for source in hidden_sources(case):
        student, _ = with_gradient(case.student)
        tokens = loss(student, case.teacher, **case.options)
        with torch.no_grad():
            source.hidden.add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            tokens.sum().backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_shared_head_learns_from_the_students_side_alone(reduction: str) -> None:
    case = hidden_case(N, V, H).to(torch.float32).having(reduction=reduction)
    expected = evaluate(loss, case).gradients["weight"]
    student, teacher = hidden_sources(case)
    weight = student.weight.clone().requires_grad_()
    value = loss(replace(student, weight=weight), replace(teacher, weight=weight), **case.options)
    value.backward(upstream_of(value))
    torch.testing.assert_close(weight.grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_teachers_own_parameters_receive_nothing(reduction: str, backend: str) -> None:
    """They may require a gradient (they may be trained elsewhere), with or without a student that does."""
    case = hidden_case(N, V, H, bias=True, teacher_width=11).to(torch.float32)
    case = case.having(reduction=reduction, backend=backend)
    _, teacher = hidden_sources(case)
    assert teacher.bias is not None
    weight, bias = teacher.weight.clone().requires_grad_(), teacher.bias.clone().requires_grad_()
    live = replace(case, teacher=replace(teacher, weight=weight, bias=bias))
    outcome, expected = evaluate(loss, live), evaluate(loss, case)
    assert torch.equal(outcome.loss, expected.loss)
    assert weight.grad is None
    assert bias.grad is None
    untrained = loss(live.student, live.teacher, **live.options)
    assert not untrained.requires_grad
    torch.testing.assert_close(untrained, expected.loss)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_only_what_is_trained_has_a_gradient(trained: tuple[str, ...], reduction: str) -> None:
    case = (
        hidden_case(N, V, H, bias=True)
        .to(torch.float32)
        .having(reduction=reduction, workspace_bytes=WORKSPACE)
    )
    expected = evaluate(loss, case).gradients
    leaves: dict[str, Any] = {
        name: x.clone().requires_grad_(name in trained) for name, x in tensors_of(case.student).items()
    }
    value = loss(replace(case.student, **leaves), case.teacher, **case.options)
    value.backward(upstream_of(value))
    for name, leaf in leaves.items():
        if name in trained:
            assert torch.equal(leaf.grad, expected[name])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_gradient_there_is_no_graph(reduction: str) -> None:
    case = hidden_case(N, V, H).to(torch.float32).having(reduction=reduction)
    student, _ = with_gradient(case.student)
    with torch.no_grad():
        value = loss(student, case.teacher, **case.options)
    assert not value.requires_grad
    torch.testing.assert_close(value, evaluate(loss, case).loss, rtol=1e-6, atol=1e-7)
    statistics = token_stats(student, case.teacher)
    assert not any(x.requires_grad for x in statistics)


# ---- what it costs


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    ("trained", "per_chunk"),
    [(("hidden", "weight"), 4), (("hidden",), 3), (("weight",), 3), ((), 2)],
    ids=["trainable head", "frozen head", "head alone", "loss alone"],
)
def test_gemms_of_a_reduced_loss(trained: tuple[str, ...], per_chunk: int, mask: bool) -> None:
    for name in ("forward_kl", "reverse_kl", "jsd", "opsd"):
        case = hidden_case(N, V, H).to(torch.float32).having(objective=name, workspace_bytes=WORKSPACE)
        live = N
        if mask:
            case, live = case.having(mask=torch.arange(N) % 2 == 0), 16
        chunks = -(-live // CHUNK)
        assert len(_run(case, trained).gemms) == per_chunk * chunks


def test_gemms_of_a_loss_per_token() -> None:
    """2 per chunk of rows in the forward and 4 (3 with a frozen head) per slab of columns in the backward."""
    columns = WORKSPACE // (2 * N * 4)
    chunks, slabs = -(-N // CHUNK), -(-V // columns)
    case = hidden_case(N, V, H).to(torch.float32).having(reduction="none", workspace_bytes=WORKSPACE)
    assert len(_run(case).gemms) == 2 * chunks + 4 * slabs
    assert len(_run(case, ("hidden",)).gemms) == 2 * chunks + 3 * slabs
    assert len(_run(case, ()).gemms) == 2 * chunks
    whole = case.having(workspace_bytes=10**9)
    assert len(_run(whole).gemms) == 6


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("how", ["mask", "zero weight", "both"])
def test_dead_rows_never_reach_a_gemm(how: str, reduction: str) -> None:
    mask, weight = torch.arange(N) % 3 != 0, (torch.arange(N) % 2).float()
    options: dict[str, Any] = {"mask": mask, "token_weight": weight}
    if how != "both":
        del options["token_weight" if how == "mask" else "mask"]
    live = int(
        ((mask if how != "zero weight" else weight > 0) & (weight > 0 if how != "mask" else mask)).sum()
    )
    case = (
        hidden_case(N, V, H).to(torch.float32).having(reduction=reduction, workspace_bytes=10**9, **options)
    )
    recorder = _run(case)
    dimensions = {size for gemm in recorder.gemms for shape in gemm for size in shape}
    assert live < N
    assert dimensions == {live, V, H}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", [*REDUCTIONS, "token_stats"])
def test_memory_does_not_grow_with_tokens_times_vocabulary(call: str, dtype: torch.dtype) -> None:
    rows, vocab, width = 2000, 960, 32
    case = hidden_case((4, rows // 4), vocab, width).to(dtype)
    case = case.having(mask=torch.arange(rows).reshape(4, -1) % 5 != 0, workspace_bytes=2 * 16 * vocab * 4)
    if call == "token_stats":
        with Recorder() as recorder:
            token_stats(case.student, case.teacher, **case.options)
    else:
        recorder = _run(case.having(reduction=call))
    hidden_bytes = rows * width * 4
    assert recorder.largest <= hidden_bytes
    assert recorder.largest < rows * vocab * 4 / 10


@pytest.mark.parametrize(
    "teacher_head", [lambda w: w, lambda w: w.detach(), lambda w: w[:]], ids=["same", "detached", "view"]
)
@pytest.mark.parametrize("vocab_size", [None, V - 3])
def test_a_shared_head_of_two_bytes_is_cast_once(
    teacher_head: Callable[[torch.Tensor], torch.Tensor], vocab_size: int | None
) -> None:
    """Where no GEMM reads 2-byte operands and writes fp32; the copy is the largest buffer there is."""
    case = hidden_case(N, V, H).to(torch.bfloat16)
    student, teacher = hidden_sources(case)
    teacher = replace(teacher, weight=teacher_head(student.weight.requires_grad_()))
    with Recorder() as recorder:
        loss(student, teacher, vocab_size=vocab_size, workspace_bytes=WORKSPACE)
    assert recorder.casts.count((vocab_size or V, H)) == 1


def test_the_heads_gradient_does_not_decay_with_chunks() -> None:
    """fp32 accumulation whatever the head's dtype: 256 chunks are as exact as one."""
    case = hidden_case(256, 401, 24).to(torch.bfloat16).having(objective="forward_kl")
    truth = evaluate(partial(loss, backend="reference"), case.to(torch.float64)).gradients["weight"]
    errors = []
    for rows in (256, 64, 8, 1):
        outcome = evaluate(loss, case.having(workspace_bytes=2 * rows * 401 * 4))
        errors.append(relative_error(outcome.gradients["weight"], truth))
    assert max(errors) <= 1.2 * errors[0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_input_same_bits(dtype: torch.dtype, reduction: str) -> None:
    case = hidden_case(65, 1031, 24, bias=True).to(dtype).having(mask=torch.arange(65) % 3 != 0)
    first = evaluate(loss, case.having(reduction=reduction))
    for _ in range(5):
        again = evaluate(loss, case.having(reduction=reduction))
        assert torch.equal(again.loss, first.loss)
        for name, gradient in first.gradients.items():
            assert torch.equal(again.gradients[name], gradient)

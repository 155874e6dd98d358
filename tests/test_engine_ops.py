"""The engine's operators as PyTorch sees them: opcheck, gradcheck, torch.compile, fake tensors, threads."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

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
from opsd_kernels.testing import Case, evaluate, hidden_case, hidden_sources, logits_case, with_gradient

N, V, H = 6, 13, 4
EVEN = torch.arange(N) % 2 == 0


def combined(case: Case) -> Case:
    """A teacher of every kind: routed between a mixture (with a log-linear part) and logits."""
    student, teacher = hidden_sources(case)
    own = replace(teacher, weight=teacher.weight * 0.9)
    factor = torch.linspace(-0.5, 1.5, N).to(teacher.hidden.dtype)
    mixed = LogLinear([(factor, teacher), (0.5, own), (0.25, student)])
    parts = Mixture([(0.25, mixed), (0.75, teacher)])
    return replace(
        case, teacher=Routed([parts, Logits(teacher.hidden @ teacher.weight.T)], torch.arange(N) % 2)
    )


def example(name: str, dtype: torch.dtype = torch.float32) -> Case:
    """A case that reaches a part of the operators' arguments."""
    case = hidden_case(N, V, H, bias=True, softcap=9.0).to(dtype)
    case = case.having(token_ids=torch.arange(N))  # without, their log-probs are NaN, which equals nothing
    if name == "mask":
        return case.having(mask=EVEN, objective="forward_kl", temperature=1.3)
    if name == "rows":
        weight = torch.linspace(-1, 1, N).to(dtype)
        return case.having(rows=torch.tensor([4, 0, 3]), token_weight=weight, objective="reverse_kl")
    if name == "support":
        ids = torch.arange(3 * N).reshape(N, 3) % V - 1
        return case.having(support_ids=ids, objective=Objective("jsd", support=Support(None, "given")))
    if name == "combined":
        return combined(case).having(objective="jsd")
    assert name == "logits"
    return logits_case(N, V).to(dtype).having(objective="forward_kl", token_ids=torch.arange(N))


class Calls(TorchDispatchMode):
    """The engine's operators that run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "opsd_kernels":
            self.found.append((func, args))
        return func(*args, **(kwargs or {}))


def check_operators(case: Case, trained: list[bool], expected: set[str]) -> None:
    """opcheck with the very arguments that the public functions pass."""
    leaves = [x.clone().requires_grad_(t) for x, t in zip(case.student.tensors, trained, strict=True)]
    student = case.student.with_tensors(leaves)
    stats = {k: v for k, v in case.options.items() if k not in ("reduction", "token_weight")}
    with Calls() as calls:
        value, _ = loss_and_stats(student, case.teacher, **case.options)
        if any(trained):
            value.sum().backward()
        token_stats(student, case.teacher, **stats)
    assert {func.overloadpacket.__name__ for func, _ in calls.found} == expected
    for func, args in calls.found:
        wants = trained if func.overloadpacket.__name__ != "token_loss_backward" else [False] * 3
        tensors = [x.detach().clone().requires_grad_(w) for x, w in zip(args[0], wants, strict=False)]
        constants = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args[2:]]
        result = torch.library.opcheck(func, (tensors, [x.detach().clone() for x in args[1]], *constants))
        assert set(result.values()) == {"SUCCESS"}
        assert len(result) == 4


# `token_stats` calls it without gradient recording; opcheck does not.
@pytest.mark.filterwarnings("ignore:.*token_stats. an autograd kernel was not registered")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["mask", "rows", "support", "combined", "logits"])
def test_opcheck(name: str, reduction: str) -> None:
    case = example(name).having(reduction=reduction)
    names = {"weighted_sum"} if reduction == "mean" else {"token_loss", "token_loss_backward"}
    check_operators(case, [True] * len(case.student.tensors), names | {"token_stats"})


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_without_gradient(reduction: str) -> None:
    case = example("mask").having(reduction=reduction)
    name = "weighted_sum" if reduction == "mean" else "token_loss"
    check_operators(case, [False] * 3, {name, "token_stats"})


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "objective",
    [
        "opsd",
        Objective("reverse_kl", token_clip=0.6),
        Objective("forward_kl", support=Support(3, "student", "tail")),
        Objective("jsd", beta=0.3, support=Support(3, "union", "renormalise")),
        Objective("reverse_kl", support=Support(4, "teacher", "drop")),
    ],
    ids=str,
)
def test_gradcheck(objective: Any, reduction: str) -> None:
    """The operators' gradient is the derivative of their value, in fp64."""
    case = combined(hidden_case(N, 7, 3, bias=True, softcap=4.0, peak=2.0))
    options = {"objective": objective, "reduction": reduction, "mask": EVEN, "temperature": 1.2}
    student = case.student
    leaves = [x.clone().requires_grad_() for x in student.tensors]  # the teacher's memory stays as it is

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return loss(student.with_tensors(tensors), case.teacher, **options)

    assert torch.autograd.gradcheck(function, tuple(leaves), eps=1e-6, atol=1e-7, rtol=1e-5)


# ---- torch.compile


def plain(h: Any, t: Any, w: Any, keep: Any, temperature: float) -> Any:
    return 2 * loss(h, t, w, mask=keep, objective="jsd", temperature=temperature)


def supported(h: Any, t: Any, w: Any, keep: Any, temperature: float) -> Any:
    objective = Objective("reverse_kl", token_clip=3.0, support=Support(4, "union"))
    tokens = loss(h, t, w, mask=keep, objective=objective, reduction="none", temperature=temperature)
    return (tokens * t.abs().sum(-1)).sum()


def weighted(h: Any, t: Any, w: Any, keep: Any, temperature: float) -> Any:
    student = Hidden(h, w, softcap=9.0)
    teacher = LogLinear([(0.6, Hidden(t, w, softcap=9.0)), (0.4, Hidden(h.detach(), w, softcap=9.0))])
    weight = lambda stats: stats.jsd + stats.student_entropy.sigmoid()  # noqa: E731
    ratio = Objective("forward_kl", entry_clip=1.0, clip_mode="ratio")
    return loss(student, teacher, objective=ratio, mask=keep, token_weight=weight, temperature=temperature)


def with_stats(h: Any, t: Any, w: Any, keep: Any, temperature: float) -> Any:
    ids = torch.zeros(h.shape[:-1], dtype=torch.int64)
    options: dict[str, Any] = {"mask": keep, "temperature": temperature}
    found = loss_and_stats(h, t, w, objective="opsd", token_ids=ids, grad_filter=1e-3, **options)
    other = token_stats(h, t, w, objective=Objective("jsd", entry_clip=0.01), temperature=temperature)
    return found.loss + (found.stats.student_logprob + other.clipped_fraction).sum()


@pytest.mark.parametrize("function", [plain, supported, weighted, with_stats], ids=lambda f: f.__name__)
def test_compiled_functions_are_the_eager_ones(function: Any) -> None:
    """Whole graphs, at most two of them for 8 sizes; another temperature is a constant, so a graph more."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    weight = normal(V, H)
    for index, rows in enumerate((3, 5, 6, 8, 9, 12, 16, 17, 3, 8)):
        h, t, keep = normal(rows, 4, H), normal(rows, 4, H), normal(rows, 4) > -0.5
        results = []
        for f in (function, compiled):
            leaves = h.clone().requires_grad_(), weight.clone().requires_grad_()
            value = f(leaves[0], t, leaves[1], keep, 1.1 if index < 8 else 0.7)
            value.backward()
            results.append((value.detach(), *[x.grad for x in leaves]))
        torch.testing.assert_close(results[1], results[0], rtol=2e-6, atol=1e-7)
        assert results[0][1].norm() > 1e-3
        if index == 7:
            assert counters["stats"]["unique_graphs"] <= 2
    assert counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fake_tensors_have_the_shapes_of_real_ones(reduction: str) -> None:
    options = {"reduction": reduction, "objective": Objective("jsd", support=Support(3, "intersection"))}
    with FakeTensorMode():
        h = torch.empty(2, 3, H, dtype=torch.bfloat16, requires_grad=True)
        w = torch.empty(V, H, requires_grad=True)
        t, mask = torch.empty(2, 3, H), torch.ones(2, 3, dtype=torch.bool)
        found = loss_and_stats(h, t, w, mask=mask, **options)
        assert found.loss.shape == ((2, 3) if reduction == "none" else ())
        assert found.loss.dtype == torch.float32
        assert {(tuple(x.shape), x.dtype) for x in found.stats} == {((2, 3), torch.float32)}
        found.loss.sum().backward()
        for leaf in (h, w):
            assert leaf.grad is not None
            assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)


# ---- autograd and threads


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["rows", "support", "combined"])
def test_backward_twice_changes_nothing(name: str, reduction: str) -> None:
    case = example(name).having(reduction=reduction)
    student, leaves = with_gradient(case.student)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(student, case.teacher, **case.options).sum()
    first, second = (torch.autograd.grad(value, list(leaves.values()), retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert a.norm() > 0
    assert kept
    for tensor, copy in kept:
        assert torch.equal(tensor, copy)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, list(leaves.values()), create_graph=True)


@pytest.mark.parametrize(
    "field", ["student.weight", "student.bias", "teacher.hidden", "token_weight", "rows"]
)
def test_any_input_changed_before_the_backward_is_an_error(field: str) -> None:
    """Design B reads its inputs again; the reduced loss of design A is done with them."""
    for reduction in ("none", "sum"):
        case = example("rows").having(reduction=reduction)
        student, _ = with_gradient(case.student)
        value = loss(student, case.teacher, **case.options).sum()
        owner, _, name = field.rpartition(".")
        tensor = (
            getattr(case.teacher if owner == "teacher" else student, name) if owner else case.options[name]
        )
        with torch.no_grad():
            tensor.add_(0)
        if reduction == "none":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                value.backward()
        else:
            value.backward()


def power(exponent: int) -> Any:
    return lambda stats: stats.jsd**exponent


@pytest.mark.parametrize("kind", ["sum", "none", "function"])
def test_threads_do_not_disturb_each_other(kind: str) -> None:
    """Eight at once, each with its own rows and function, give the bits of one after the other."""
    cases = [hidden_case(9 + n, 31, 8, seed=n).to(torch.float32) for n in range(8)]
    if kind == "function":
        cases = [case.having(token_weight=power(n)) for n, case in enumerate(cases)]
    else:
        cases = [case.having(reduction=kind) for case in cases]
    initializer = partial(torch.set_num_threads, 1)
    alone = [evaluate(loss, case) for case in cases]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # between any two lines, not every 5 ms
    try:
        with ThreadPoolExecutor(8, initializer=initializer) as pool:
            together = list(pool.map(partial(evaluate, loss), cases * 10))
    finally:
        sys.setswitchinterval(interval)
    for index, outcome in enumerate(together):
        expected = alone[index % 8]
        assert torch.equal(outcome.loss, expected.loss)
        for name, gradient in expected.gradients.items():
            assert torch.equal(outcome.gradients[name], gradient)

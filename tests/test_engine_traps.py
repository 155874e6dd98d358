"""Lines that look as if they could go, each with the value that would be wrong without it."""

from dataclasses import replace

import pytest
import torch

from opsd_kernels import Hidden, Logits, LogLinear, Mixture, Objective, loss
from opsd_kernels.engine import projection
from opsd_kernels.recipes import Estimator, Recipe, Term, Weight
from opsd_kernels.testing import hidden_case, hidden_sources, with_gradient

CASE = hidden_case((2, 5), 23, 8)


@pytest.mark.parametrize("factors", [(1.0, -1.0), (0.5, -1.0), (2.0, -0.5)])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_an_excluded_column_of_mixed_hidden_states(factors: tuple[float, float], backend: str) -> None:
    """sum_k a_k times a bias of -inf is NaN at a sum of 0, and +inf below: the column stays excluded."""
    bias = torch.zeros(23, dtype=torch.float64)
    bias[[3, 20]] = -torch.inf
    (student, teacher), generator = hidden_sources(CASE), torch.Generator().manual_seed(1)
    other = torch.randn(teacher.hidden.shape, generator=generator, dtype=torch.float64)
    streams = [
        (factor, Hidden(hidden, teacher.weight, bias))
        for factor, hidden in zip(factors, (teacher.hidden, other), strict=True)
    ]
    student = replace(student, bias=bias)
    z = factors[0] * teacher.hidden @ teacher.weight.T + factors[1] * other @ teacher.weight.T
    expected = loss(
        student,
        Logits(z + bias),
        objective="forward_kl",
        backend=backend,
    )
    for mix in ("auto", "logits"):
        found = loss(student, LogLinear(streams, mix=mix), objective="forward_kl", backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("zero", [0, 0.0, torch.zeros(2, 5, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_mixture_takes_nothing_of_a_stream_of_weight_0(zero: float, backend: str) -> None:
    student, teacher = hidden_sources(CASE)
    other = Hidden(teacher.hidden.flip(0) * 30, teacher.weight)
    one = 1.0 if not isinstance(zero, torch.Tensor) else torch.ones(2, 5, dtype=torch.float64)
    for streams in ([(one, teacher), (zero, other)], [(zero, other), (one, teacher)]):
        found = loss(student, Mixture(streams), objective="forward_kl", backend=backend)
        expected = loss(student, teacher, objective="forward_kl", backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_loss_is_memory_of_its_own(dtype: torch.dtype) -> None:
    """What the backward needs is kept beside it: to change the loss in place changes no gradient."""
    case = CASE.to(dtype).having(objective="jsd", reduction="none")
    (student, leaves), (untouched, expected) = with_gradient(case.student), with_gradient(case.student)
    value = loss(student, case.teacher, **case.options)
    loss(untouched, case.teacher, **case.options).sum().backward()
    value.mul_(7.0)
    value.sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 7.0 * expected[name].grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("operand", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("head", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_autocast_rounds_no_head_of_two_bytes(
    head: torch.dtype, operand: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has been rounded already: to round bf16 to fp16 once more would overflow."""
    weight = torch.ones(3, 2, dtype=head)
    setting = projection.Setting(
        None, 1.0, torch.float64 if head == torch.float64 else torch.float32, operand
    )
    assert setting.head_dtype(weight) == setting.dtype  # on a CPU in the logits' own
    monkeypatch.setattr(projection, "keeps_operands", lambda device: True)
    rounds = head == torch.float32 and operand is not None
    assert setting.head_dtype(weight) == (operand if rounds else head)


@pytest.mark.parametrize("what", [torch.nan, torch.inf])
@pytest.mark.parametrize("how", [{}, {"reduction": "none"}, {"backend": "reference"}], ids=str)
def test_a_teacher_does_no_harm_where_its_term_has_weight_0(how: dict, what: float) -> None:
    """Tokens that another term counts: 0 times the NaN of this one's teacher is no part of their gradient."""
    case = hidden_case((2, 5), 23, 8)
    selected = torch.arange(10).reshape(2, 5) % 3 == 0
    second = case.teacher.hidden.flip(0)
    spoilt = second.masked_fill(~selected[..., None], what)
    recipe = Recipe(
        (
            Term(Objective("forward_kl"), 1.0, "a"),
            Term(Objective("reverse_kl"), 0.5, "b", (Weight("selected"),)),
            Term(Estimator("k2"), 0.3, "b", (Weight("selected"),)),
        )
    )
    options = {
        "objective": recipe,
        "token_ids": torch.arange(10).reshape(2, 5),
        "data": {"selected": selected},
    }
    found = {}
    for name, hidden in (("clean", second), ("spoilt", spoilt)):
        student, leaves = with_gradient(case.student)
        teachers = {"a": case.teacher, "b": Hidden(hidden, case.student.weight.detach())}
        value = loss(student, teachers, **options, **how)
        value.sum().backward()
        found[name] = [value.detach(), *[leaf.grad for leaf in leaves.values()]]
    for x, y in zip(found["spoilt"], found["clean"], strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, rtol=0, atol=0)

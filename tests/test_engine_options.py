"""Options of the loss against what they equal: rows, weights as a function, main_grad, tight budgets."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from opsd_kernels import (
    LogLinear,
    Mixture,
    Objective,
    Routed,
    Support,
    TokenStats,
    loss,
    loss_and_stats,
    token_stats,
)
from opsd_kernels.backends.triton import tiles
from opsd_kernels.engine import plan
from opsd_kernels.testing import (
    Case,
    Outcome,
    evaluate,
    hidden_case,
    hidden_sources,
    relative_error,
    upstream_of,
    with_gradient,
)

REDUCTIONS = ("mean", "sum", "none")
LEAD, N, V, H, CHUNK = (5, 6), 30, 97, 8, 7
MASK = (torch.arange(N) % 4 != 1).reshape(LEAD)
ROWS = MASK.reshape(-1).nonzero()[:, 0]
WEIGHT = torch.linspace(-1, 2, N).reshape(LEAD)
WEIGHT[2] = 0


def base(**options: Any) -> Case:
    """Live rows in several chunks, the last one smaller; design B has several slabs."""
    case = hidden_case(LEAD, V, H, bias=True, softcap=9.0).to(torch.float32)
    return case.having(workspace_bytes=2 * CHUNK * V * 4, **options)


def assert_equal(actual: Outcome, expected: Outcome) -> None:
    """Bit by bit."""
    assert torch.equal(actual.loss, expected.loss)
    for name, gradient in expected.gradients.items():
        assert torch.equal(actual.gradients[name], gradient), name


def assert_close(actual: Outcome, expected: Outcome, rounding: float = 2e-6) -> None:
    """To fp32 rounding, relative in the L2 norm."""
    assert relative_error(actual.loss, expected.loss) < rounding
    for name, gradient in expected.gradients.items():
        assert relative_error(actual.gradients[name], gradient) < rounding, name


# ---- rows


def combined(case: Case) -> Case:
    student, teacher = hidden_sources(case)
    mixed = Mixture([(0.5, teacher), (0.5, LogLinear([(WEIGHT, teacher), (0.5, student)]))])
    return replace(case, teacher=Routed([mixed, teacher], torch.arange(N).reshape(LEAD) % 2))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("teacher", ["one", "combined"])
def test_rows_are_the_mask(teacher: str, reduction: str) -> None:
    case = base(reduction=reduction)
    case = combined(case) if teacher == "combined" else case
    for rows in (ROWS, ROWS.int()):
        assert_equal(evaluate(loss, case.having(rows=rows)), evaluate(loss, case.having(mask=MASK)))


def test_rows_of_the_other_functions() -> None:
    ids = torch.arange(N).reshape(LEAD)
    by_mask, by_rows = base(mask=MASK, token_ids=ids), base(rows=ROWS, token_ids=ids)
    expected = token_stats(by_mask.student, by_mask.teacher, **by_mask.options)
    for a, b in zip(token_stats(by_rows.student, by_rows.teacher, **by_rows.options), expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        loss_and_stats(by_rows.student, by_rows.teacher, **by_rows.options).stats, expected, strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_in_any_order(reduction: str) -> None:
    shuffled = ROWS[torch.randperm(ROWS.numel(), generator=torch.Generator().manual_seed(0))]
    expected = evaluate(loss, base(mask=MASK, reduction=reduction))
    outcome = evaluate(loss, base(rows=shuffled, reduction=reduction))
    assert_close(outcome, expected)
    dead = outcome.gradients["hidden"][~MASK]
    assert torch.equal(dead, torch.zeros_like(dead))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_with_weights(reduction: str, backend: str) -> None:
    """Zero weights stay among the rows, so the chunks are not a mask's; NaN elsewhere does no harm."""
    expected = evaluate(loss, base(mask=MASK, token_weight=WEIGHT, reduction=reduction, backend=backend))
    weight = WEIGHT.masked_fill(~MASK, torch.nan)
    outcome = evaluate(loss, base(rows=ROWS, token_weight=weight, reduction=reduction, backend=backend))
    assert_close(outcome, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(reduction: str) -> None:
    case = base(rows=ROWS[:0], reduction=reduction)
    outcome = evaluate(loss, case, torch.ones(LEAD if reduction == "none" else ()))
    assert torch.equal(outcome.loss, torch.zeros_like(outcome.loss))
    for gradient in outcome.gradients.values():
        assert torch.equal(gradient, torch.zeros_like(gradient))
    for value in loss_and_stats(case.student, case.teacher, **case.options).stats:
        assert torch.equal(value, torch.zeros(LEAD))


# ---- loss_and_stats


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("support", [None, Support(4, "union")], ids=str)
def test_loss_and_stats_are_loss_and_token_stats(support: Any, reduction: str, backend: str) -> None:
    objective = Objective("jsd", entry_clip=0.02, support=support)
    ids = torch.arange(N).reshape(LEAD)
    case = base(mask=MASK, token_ids=ids, token_weight=WEIGHT, objective=objective, backend=backend)
    both = evaluate(lambda *a, **k: loss_and_stats(*a, **k).loss, case.having(reduction=reduction))
    assert_equal(both, evaluate(loss, case.having(reduction=reduction)))
    student, _ = with_gradient(case.student)
    found = loss_and_stats(student, case.teacher, reduction=reduction, **case.options)
    options = {k: v for k, v in case.options.items() if k != "token_weight"}
    counted = MASK & (WEIGHT != 0)
    expected = token_stats(case.student, case.teacher, **(options | {"mask": counted}))
    for name, a, b in zip(TokenStats._fields, found.stats, expected, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    with torch.no_grad():
        untrained = loss_and_stats(case.student, case.teacher, reduction=reduction, **case.options)
    for a, b in zip(untrained.stats, found.stats, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# ---- weights from statistics


def entropy_and_ids(stats: TokenStats) -> torch.Tensor:
    return stats.student_entropy.sigmoid() - (stats.teacher_logprob - stats.student_logprob).tanh()


def nan_at_dead_rows(stats: TokenStats) -> torch.Tensor:
    """0 / 0 where the statistics are 0; no live row's entropy is."""
    return stats.student_entropy.square() / stats.student_entropy


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", [entropy_and_ids, nan_at_dead_rows], ids=["entropy", "nan at dead rows"])
def test_a_function_is_its_weights(
    function: Callable[[TokenStats], torch.Tensor],
    reduction: str,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "DEFAULT", tiles.Tiles(block=128, stats_block=128, splits=1))
    ids = torch.arange(N).reshape(LEAD)
    # Triton's interpreter takes tens of milliseconds a row; 5 rows are two of its chunks.
    mask = MASK & (ids < 7) if backend == "triton" else MASK
    case = base(mask=mask, token_ids=ids, reduction=reduction, backend=backend)
    case = case.having(workspace_bytes=2 * 3 * V * 4) if backend == "triton" else case
    stats = token_stats(case.student, case.teacher, mask=mask, token_ids=ids, backend=backend)
    weight = function(stats)
    assert weight[mask].isfinite().all()
    assert weight[mask].std() > 0.01
    if function is nan_at_dead_rows:
        assert weight[~mask].isnan().all()
    outcome = evaluate(loss, case.having(token_weight=function))
    assert_close(outcome, evaluate(loss, case.having(token_weight=weight)), 1e-5)
    assert_close(outcome, evaluate(loss, case.having(token_weight=weight, backend="reference")), 1e-5)


def test_a_functions_weights_are_constants() -> None:
    """What a function computes from a trained tensor of its own receives no gradient."""
    factor = torch.ones((), requires_grad=True)
    for reduction in REDUCTIONS:
        case = base(reduction=reduction, token_weight=lambda s: (s.jsd + 1) * factor)
        expected = evaluate(loss, base(reduction=reduction, token_weight=lambda s: s.jsd + 1))
        assert_equal(evaluate(loss, case), expected)
    assert factor.grad is None


# ---- main_grad


def into_main_grad(case: Case, main_grad: torch.Tensor, times: int = 1, factor: float = 1.0) -> Outcome:
    """Backward passes of one forward; the head's own gradient stays None."""
    student, leaves = with_gradient(case.student)
    value = loss(student, case.teacher, main_grad=main_grad, **case.options)
    for _ in range(times):
        (factor * value).backward(upstream_of(value), retain_graph=True)
    assert leaves["weight"].grad is None
    return Outcome(value.detach(), {n: x.grad for n, x in leaves.items() if x.grad is not None})


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("head", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_is_the_heads_gradient_in_fp32(head: torch.dtype, reduction: str) -> None:
    case = base(mask=MASK, reduction=reduction).to(torch.float32, head=head)
    wide = evaluate(loss, case.to(torch.float32))  # the same numbers in fp32, and so their gradient
    before = torch.randn(V, H, generator=torch.Generator().manual_seed(1))
    main_grad = before.clone()
    outcome = into_main_grad(case, main_grad)
    torch.testing.assert_close(main_grad, before + wide.gradients["weight"], rtol=1e-6, atol=1e-6)
    exact = torch.zeros(V, H)
    into_main_grad(case, exact)
    assert relative_error(exact, wide.gradients["weight"]) < 1e-6
    assert torch.equal(exact.to(head), evaluate(loss, case).gradients["weight"])
    assert torch.equal(outcome.gradients["hidden"], evaluate(loss, case).gradients["hidden"])
    assert set(outcome.gradients) == {"hidden", "bias"}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_main_grad_accumulates(reduction: str) -> None:
    case = base(mask=MASK, reduction=reduction)
    once, twice, scaled = torch.zeros(3, V, H).unbind(0)
    into_main_grad(case, once)
    into_main_grad(case, twice, times=2)
    torch.testing.assert_close(twice, 2 * once, rtol=1e-6, atol=0)
    into_main_grad(case, scaled, factor=-0.25)
    torch.testing.assert_close(scaled, -0.25 * once, rtol=1e-5, atol=1e-8)
    into_main_grad(case, once)
    torch.testing.assert_close(once, twice, rtol=1e-6, atol=0)


def test_main_grad_with_a_filter() -> None:
    case = base(grad_filter=1e-2)
    main_grad = torch.zeros(V, H)
    into_main_grad(case, main_grad)
    assert torch.equal(main_grad, evaluate(loss, case).gradients["weight"])


# ---- budgets


@pytest.mark.parametrize(("device", "fewest"), [("cuda", 512), ("xpu", 512), ("cpu", 0)])
def test_when_a_budget_is_tight(device: str, fewest: int) -> None:
    row = 50_000 * 4
    for tokens in (10_000, 100):
        # Fewer tokens than that need no more than room for themselves.
        enough = 2 * min(fewest, tokens) * row
        assert not plan.budget_is_tight(None, tokens, row, device)
        assert not plan.budget_is_tight(max(enough, 1), tokens, row, device)
        assert plan.budget_is_tight(max(enough - 1, 1), tokens, row, device) == (fewest > 0)
        assert plan.budget_is_tight(1, tokens, row, device) == (fewest > 0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weights", [None, WEIGHT, entropy_and_ids], ids=["none", "tensor", "function"])
def test_a_tight_budget_is_spent_on_slabs(
    weights: Any, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Design B instead of A, with the same loss and gradients."""
    ids = torch.arange(N).reshape(LEAD)
    case = base(mask=MASK, token_ids=ids, token_weight=weights, reduction=reduction, denominator=None)
    chunks = evaluate(loss, case)
    monkeypatch.setitem(plan.FEWEST_ROWS_TRAINABLE_HEAD, "cpu", CHUNK + 1)
    ran: list[str] = []
    for name in ("token_loss", "weighted_sum"):
        operator = getattr(torch.ops.opsd_kernels, name)
        spy = lambda *a, o=operator, n=name: (ran.append(n), o(*a))[1]  # noqa: E731
        monkeypatch.setattr(torch.ops.opsd_kernels, name, spy)
    assert_close(evaluate(loss, case), chunks, 5e-6)
    assert ran == ["token_loss"]
    student, _ = hidden_sources(case)
    frozen = replace(student, hidden=student.hidden.clone().requires_grad_())
    loss(frozen, case.teacher, **case.options).backward()
    evaluate(loss, case.having(grad_filter=1e-9))  # the filter is one of chunks
    evaluate(loss, case.having(workspace_bytes=None))
    evaluate(loss, case.having(workspace_bytes=2 * N * V * 4))
    assert ran == ["token_loss"] + ["weighted_sum"] * 4

"""Where formulas break: excluded columns, infinite and NaN rows, nothing to do, very large logits."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from opsd_kernels import Hidden, Logits, Objective, loss
from opsd_kernels.testing import (
    Case,
    evaluate,
    hidden_case,
    hidden_sources,
    logits_case,
    logits_of,
    relative_error,
)

INF = torch.inf
REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("torch", "reference")
KINDS = ("forward_kl", "reverse_kl", "jsd", "opsd")
CLIPPED = [Objective(entry_clip=0.05), Objective(entry_clip=0.05, clip_mode="scale")]


def _per_row(z_s: torch.Tensor, z_t: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token losses, and the gradient of their sum."""
    leaf = z_s.clone().requires_grad_()
    tokens = loss(Logits(leaf), Logits(z_t), reduction="none", **options)
    tokens.sum().backward()
    assert leaf.grad is not None
    return tokens.detach(), leaf.grad


# ---- columns outside the vocabulary


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("outside", [-INF, torch.finfo(torch.float32).min, -1e9], ids=str)
@pytest.mark.parametrize("columns", [1, 5, 64])
def test_logits_padded_with_minus_infinity(
    columns: int, outside: float, reduction: str, backend: str
) -> None:
    """Also with the large finite numbers that models use for it."""
    for name in KINDS:
        case = (
            logits_case(6, 30).to(torch.float32).having(objective=name, reduction=reduction, backend=backend)
        )
        padding = torch.full((6, columns), outside)
        z_s, z_t = (torch.cat([z, padding], -1) for z in logits_of(case))
        sliced = evaluate(loss, case)
        padded = evaluate(loss, replace(case, student=Logits(z_s), teacher=Logits(z_t)))
        torch.testing.assert_close(padded.loss, sliced.loss, rtol=1e-6, atol=1e-7)
        assert relative_error(padded.gradients["z"][:, :30], sliced.gradients["z"]) < 1e-6
        assert (padded.gradients["z"][:, 30:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_columns_taken_out_by_the_bias(reduction: str, backend: str) -> None:
    """Anywhere in the vocabulary; head rows of such columns receive exactly nothing."""
    for name in KINDS:
        case = hidden_case(6, 40, 8, bias=True)  # in fp64: fewer columns are summed in another order
        case = case.having(objective=name, reduction=reduction, backend=backend)
        student, teacher = hidden_sources(case)
        assert student.bias is not None
        keep = torch.arange(40) % 7 != 3
        bias = student.bias.where(keep, -INF)
        excluded = evaluate(
            loss, replace(case, student=replace(student, bias=bias), teacher=replace(teacher, bias=bias))
        )
        head: dict[str, Any] = {"weight": student.weight[keep], "bias": student.bias[keep]}
        sliced = evaluate(
            loss, replace(case, student=replace(student, **head), teacher=replace(teacher, **head))
        )
        torch.testing.assert_close(excluded.loss, sliced.loss, rtol=1e-12, atol=1e-14)
        for name_, gradient in excluded.gradients.items():
            expected = sliced.gradients[name_]
            if name_ != "hidden":
                assert (gradient[~keep] == 0).all()
                gradient = gradient[keep]
            assert relative_error(gradient, expected) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocab_size_cuts_both_heads(dtype: torch.dtype, reduction: str, backend: str) -> None:
    """Each side padded to a size of its own, with rows of NaN that nobody may read."""
    case = hidden_case(6, 40, 8, bias=True).to(dtype).having(reduction=reduction, backend=backend)
    student, teacher = hidden_sources(case)

    def padded(source: Hidden, rows: int) -> Hidden:
        assert source.bias is not None
        junk = torch.full((rows, 8), torch.nan, dtype=dtype)
        return replace(
            source, weight=torch.cat([source.weight, junk]), bias=torch.cat([source.bias, junk[:, 0]])
        )

    sliced = evaluate(loss, case)
    wide = replace(case, student=padded(student, 3), teacher=padded(teacher, 9)).having(vocab_size=40)
    cut = evaluate(loss, wide)
    assert torch.equal(cut.loss, sliced.loss)
    assert torch.equal(cut.gradients["hidden"], sliced.gradients["hidden"])
    for name in ("weight", "bias"):
        gradient = cut.gradients[name]
        assert torch.equal(gradient[:40], sliced.gradients[name])
        assert (gradient[40:] == 0).all()


# ---- infinite and NaN rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "excluded_by"), [("forward_kl", "student"), ("reverse_kl", "teacher")])
def test_a_token_that_one_side_excludes_is_an_infinite_divergence(
    name: str, excluded_by: str, backend: str
) -> None:
    """Documented, of that row only. Every other row is untouched, and JSD stays finite."""
    z_s, z_t = logits_of(logits_case(4, 9).to(torch.float32))
    expected = _per_row(z_s, z_t, objective=name, backend=backend)
    (z_s if excluded_by == "student" else z_t)[2, 5] = -INF
    tokens, gradient = _per_row(z_s, z_t, objective=name, backend=backend)
    assert tokens[2] == INF
    others = torch.arange(4) != 2
    assert torch.equal(tokens[others], expected[0][others])
    assert torch.equal(gradient[others], expected[1][others])
    if name == "forward_kl":  # s - t, as everywhere
        torch.testing.assert_close(gradient[2], z_s[2].softmax(-1) - z_t[2].softmax(-1))
    tokens, gradient = _per_row(z_s, z_t, objective="jsd", backend=backend)
    assert torch.isfinite(tokens).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("share", [1e-2, 1e-10, 1e-20])
def test_how_small_an_excluded_share_is_still_infinite(share: float) -> None:
    z_s, z_t = torch.tensor([[0.0, -INF]]), torch.tensor([[1.0, share]]).log()
    assert loss(Logits(z_s), Logits(z_t), objective="forward_kl") == INF
    assert loss(Logits(z_t), Logits(z_s), objective="reverse_kl") == INF


@pytest.mark.parametrize("objective", CLIPPED, ids=["zero", "scale"])
def test_a_clip_bounds_the_infinite_term(objective: Objective) -> None:
    z_s, z_t = logits_of(logits_case(4, 9).to(torch.float32))
    z_s[2, 5] = -INF
    tokens, gradient = _per_row(z_s, z_t, objective=objective)
    reference = _per_row(z_s.double(), z_t.double(), objective=objective, backend="reference")
    s, t = z_s[2].double().softmax(-1), z_t[2].double().softmax(-1)
    terms = (t * (t.log() - s.log())).clamp(max=0.05)
    torch.testing.assert_close(tokens[2].double(), terms.sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokens.double(), reference[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), reference[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["zero", "scale"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_clip_bounds_an_infinite_row(mode: str, backend: str) -> None:
    z_s, z_t = logits_of(logits_case(4, 9).to(torch.float32))
    z_s[2, 5] = -INF
    objective = Objective("forward_kl", token_clip=0.3, clip_mode=mode)
    tokens, gradient = _per_row(z_s, z_t, objective=objective, backend=backend)
    assert tokens[2] == torch.tensor(0.3)
    assert (gradient[2] == 0).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, INF], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_in_is_nan_out_of_that_row_only(side: str, bad: float, backend: str) -> None:
    for name in KINDS:
        z_s, z_t = logits_of(logits_case(5, 9).to(torch.float32))
        expected = _per_row(z_s, z_t, objective=name, backend=backend)
        (z_s if side == "student" else z_t)[3, 4] = bad
        tokens, gradient = _per_row(z_s, z_t, objective=name, backend=backend)
        others = torch.arange(5) != 3
        assert tokens[3].isnan()
        assert torch.equal(tokens[others], expected[0][others])
        assert torch.equal(gradient[others], expected[1][others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("how", ["mask", "zero weight"])
def test_nan_in_a_dead_row_does_no_harm(how: str, reduction: str, backend: str) -> None:
    case = (
        hidden_case((3, 4), 21, 8, bias=True).to(torch.float32).having(reduction=reduction, backend=backend)
    )
    live = torch.arange(12).reshape(3, 4) % 3 != 1
    case = case.having(mask=live) if how == "mask" else case.having(token_weight=live.float())
    expected = evaluate(loss, case)
    student, teacher = hidden_sources(case)
    student.hidden[~live] = torch.nan
    teacher.hidden[~live] = INF
    outcome = evaluate(loss, case)
    assert torch.equal(outcome.loss, expected.loss)
    for name, gradient in expected.gradients.items():
        assert torch.equal(outcome.gradients[name], gradient)
    assert (outcome.gradients["hidden"][~live] == 0).all()


# ---- nothing to do


def _nothing(kind: str, how: str) -> Case:
    rows = 0 if how == "no rows" else 6
    case = (hidden_case(rows, 7, 4, bias=True) if kind == "hidden" else logits_case(rows, 7)).to(
        torch.float32
    )
    if how == "all masked":
        return case.having(mask=torch.zeros(6, dtype=torch.bool))
    if how == "all weights zero":
        return case.having(token_weight=torch.zeros(6))
    return case


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("how", ["no rows", "all masked", "all weights zero"])
@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_nothing_to_do_is_a_loss_of_zero_with_zero_gradients(
    kind: str, how: str, reduction: str, backend: str
) -> None:
    case = _nothing(kind, how).having(reduction=reduction, backend=backend)
    outcome = evaluate(loss, case)
    assert outcome.loss.shape == (case.student.lead if reduction == "none" else ())
    assert (outcome.loss == 0).all()
    for name, gradient in outcome.gradients.items():
        assert gradient is not None, name
        assert gradient.shape == getattr(case.student, name).shape
        assert (gradient == 0).all(), name
    with torch.no_grad():
        assert (loss(case.student, case.teacher, **case.options) == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_vocabulary_of_one_token_has_no_divergence(reduction: str) -> None:
    for name in KINDS:
        outcome = evaluate(
            loss, hidden_case(5, 1, 4).to(torch.float32).having(objective=name, reduction=reduction)
        )
        assert (outcome.loss == 0).all()
        for gradient in outcome.gradients.values():
            assert (gradient == 0).all()


def test_logits_as_large_as_a_dtype_holds() -> None:
    """No overflow inside: the softmax is shifted, and log-ratios of 6e4 stay finite."""
    for name in KINDS:
        z_s, z_t = torch.tensor([[3e4, -3e4, 0.0]]), torch.tensor([[-3e4, 3e4, 0.0]])
        tokens, gradient = _per_row(z_s, z_t, objective=name)
        reference = _per_row(z_s.double(), z_t.double(), objective=name, backend="reference")
        torch.testing.assert_close(tokens.double(), reference[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradient.double(), reference[1], rtol=1e-5, atol=1e-7)

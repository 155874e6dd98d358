"""What clips do to the direction of the gradient: which can push down what the teacher raises, which not."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from definitions import define, log_bounded
from opsd_kernels import Hidden, Logits, Objective, Support, Target, TopK, loss, loss_and_stats, token_stats
from opsd_kernels.recipes import Recipe, Term
from opsd_kernels.testing import (
    assert_case_accurate,
    evaluate,
    hidden_case,
    hidden_sources,
    logits_case,
    relative_error,
)
from triton_cases import small_blocks

BACKENDS = ("torch", "reference")
RATIO = Objective("forward_kl", entry_clip=1.0, clip_mode="ratio")
logs = st.floats(-8, 0)


def gradient(s: Tensor, t: Tensor, objective: Objective, backend: str = "torch") -> Tensor:
    """dL/dz of rows of probabilities."""
    z = s.log().requires_grad_()
    loss(Logits(z), Logits(t.log()), objective=objective, backend=backend, reduction="sum").backward()
    assert z.grad is not None
    return z.grad


def row(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Objective("forward_kl"), (-0.2, 0.2, 0.0)),
        (Objective("forward_kl", entry_clip=0.05), (0.12, -0.04, -0.08)),
        (Objective("forward_kl", entry_clip=0.05, clip_mode="scale"), (0.0505, 0.0121, -0.0626)),
        (Objective("forward_kl", entry_clip=0.2, clip_mode="ratio"), (-0.0795, 0.0723, 0.0073)),
    ],
    ids=["no clip", "zero", "scale", "ratio"],
)
def test_what_a_teacher_of_80_percent_does_to_a_student_of_60(
    objective: Objective, expected: tuple[float, ...], backend: str
) -> None:
    """A positive dL/dz pushes down: both clips of the terms do that to the entry that the teacher raises."""
    found = gradient(row(0.6, 0.3, 0.1), row(0.8, 0.1, 0.1), objective, backend)
    torch.testing.assert_close(found, row(*expected), rtol=0, atol=5e-5)


def can_flip(s: Tensor, t: Tensor, tau: float) -> Tensor:
    """Whether the scaled clip may push an entry down."""
    return s * (1 - t) * (t / s).log() > (1 - s) * tau


def test_the_scaled_clip_flips_a_lone_clipped_entry_exactly_by_the_rule() -> None:
    grid = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    s, t = (x.flatten() for x in torch.meshgrid(grid, grid, indexing="ij"))
    possible = {}
    for tau in (0.01, 0.05, 0.1, 0.12, 0.3):
        found = gradient(
            torch.stack((s, 1 - s), 1),
            torch.stack((t, 1 - t), 1),
            Objective(entry_clip=tau, clip_mode="scale"),
        )[:, 0]
        clipped = t * (t / s).log() > tau
        assert torch.equal((found > 0) & clipped, can_flip(s, t, tau) & clipped)
        possible[tau] = t[(found > 0) & clipped]
    assert possible[0.12].numel() == possible[0.3].numel() == 0
    assert possible[0.05].min() == pytest.approx(0.15, abs=0.01)
    assert possible[0.05].max() == pytest.approx(0.92, abs=0.01)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(logs, logs), min_size=2, max_size=7), st.floats(0.01, 0.2))
def test_the_scaled_clip_flips_no_entry_beside_the_rule(pairs: list[tuple[float, float]], tau: float) -> None:
    s, t = torch.tensor(pairs, dtype=torch.float64).T[:, None].softmax(-1)
    found = gradient(s, t, Objective(entry_clip=tau, clip_mode="scale"))
    flipped = (t * (t / s).log() > tau) & (found > 1e-12)
    assert (can_flip(s, t, tau) | ~flipped).all()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(logs, logs), min_size=2, max_size=7),
    st.floats(0.01, 6),
    st.sampled_from(BACKENDS),
    st.sampled_from([None, 0.05]),
)
def test_the_bounded_ratio_never_pushes_down_what_the_teacher_raises_most(
    pairs: list[tuple[float, float]], bound: float, backend: str, token_clip: float | None
) -> None:
    s, t = torch.tensor(pairs, dtype=torch.float64).T[:, None].softmax(-1)
    objective = Objective("forward_kl", entry_clip=bound, clip_mode="ratio", token_clip=token_clip)
    found = gradient(s, t, objective, backend)
    ratio = t.log() - s.log()
    assert (found[ratio >= ratio.amax() - 1e-9] <= 1e-14).all()
    assert (found[ratio <= ratio.amin() + 1e-9] >= -1e-14).all(), "nor up what it lowers most"
    value = loss(Logits(s.log()), Logits(t.log()), objective=objective, reduction="none", backend=backend)
    whole = (t * ratio).sum(-1)
    assert (value <= whole + 1e-12).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("bound", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_bounded_ratio_is_its_definition(reduction: str, bound: float, backend: str) -> None:
    objective = Objective("forward_kl", entry_clip=bound, clip_mode="ratio", token_clip=0.4)
    case = hidden_case((2, 6), 37, 8, bias=True, gap=1.5, softcap=12.0)
    options: dict[str, Any] = {
        "objective": objective, "mask": torch.arange(12).reshape(2, 6) % 4 != 1, "temperature": 1.3,
        "token_weight": torch.linspace(-1, 2, 12).reshape(2, 6), "reduction": reduction,
    }  # fmt: skip
    case = case.having(**options)
    truth = evaluate(define, case)
    if backend == "triton":
        case = case.to(torch.float32)
    with small_blocks(block=64, stats_block=64, splits=1):
        found = evaluate(partial(loss, backend=backend), case)
    exact = 1e-12 if backend != "triton" else 1e-5
    assert relative_error(found.loss.double(), truth.loss) < exact
    for name, expected in truth.gradients.items():
        assert relative_error(found.gradients[name].double(), expected) < exact, name


@pytest.mark.parametrize("bound", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_bounded_ratio_is_as_exact_as_eager_code(
    reduction: str, dtype: torch.dtype, bound: float
) -> None:
    objective = Objective("forward_kl", entry_clip=bound, clip_mode="ratio")
    case = hidden_case(33, 257, 48, gap=1.0).to(dtype)
    assert_case_accurate(case.having(objective=objective, reduction=reduction))


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_statistics_are_those_of_the_teacher_itself(backend: str) -> None:
    """Only the clipped share knows of the bound: what of the forward KL is no longer asked for."""
    case = logits_case((4, 6), 37, gap=1.5).to(torch.float32)
    options: dict[str, Any] = {"backend": backend, "token_ids": torch.zeros(4, 6, dtype=torch.int64)}
    with small_blocks(block=64, stats_block=64, splits=1):
        plain = token_stats(case.student, case.teacher, **options)
        value, found = loss_and_stats(
            case.student, case.teacher, objective=RATIO, reduction="none", **options
        )
    for name in set(plain._fields) - {"clipped_fraction"}:
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), msg=name)
    torch.testing.assert_close(found.clipped_fraction, 1 - value / plain.forward_kl, atol=1e-5, rtol=1e-5)
    assert (found.clipped_fraction > 0.1).any()
    assert (found.clipped_fraction <= 1).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_columns_that_a_side_excludes(backend: str) -> None:
    """The student's stay out; the teacher's count as those of the lowest ratio, and the loss is finite."""
    z_s, z_t = (x.z.float() for x in (logits_case(5, 12).student, logits_case(5, 12).teacher))  # type: ignore[union-attr]
    z_s[:, 2], z_t[:, 2], z_s[:, 3], z_t[:, 4] = (-torch.inf,) * 4
    student = z_s.clone().requires_grad_()
    with small_blocks(block=64, stats_block=64, splits=1):
        value = loss(Logits(student), Logits(z_t), objective=RATIO, reduction="sum", backend=backend)
    value.backward()
    ls, lt = (z.double().log_softmax(-1) for z in (z_s, z_t))
    expected = ls.exp() - log_bounded(ls, lt, 1.0).exp()
    assert student.grad is not None
    torch.testing.assert_close(student.grad.double(), expected, rtol=1e-5, atol=1e-6)
    assert value.isfinite()


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("built", [False, True], ids=["itself", "a target"])
def test_in_a_recipe_and_with_little_memory(built: bool, budget: int | None) -> None:
    student, teacher = hidden_sources(hidden_case(9, 31, 8, gap=1.5))
    source = Target("floored", [teacher], {"floor": 1e-3}) if built else teacher
    recipe = Recipe((Term(RATIO, 0.5), Term(Objective("reverse_kl"), 0.0)))
    found = []
    for objective, scale in ((RATIO, 1), (recipe, 2)):
        leaf = Hidden(student.hidden.clone().requires_grad_(), student.weight.clone().requires_grad_())
        value = scale * loss(leaf, source, objective=objective, workspace_bytes=budget)
        value.backward()
        found.append((value, leaf.hidden.grad, leaf.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip_mode": "ratio"}, "entry_clip: expected the bound of the log-ratio .* got None"),
        ({"divergence": "jsd", "entry_clip": 1.0, "clip_mode": "ratio"}, "clip_mode: .* 'jsd'"),
        ({"entry_clip": 1.0, "clip_mode": "ratio", "support": Support(4)}, "support: expected None"),
    ],
)
def test_where_the_bounded_ratio_is_not_defined(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Objective(**options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, t: loss(s, t, objective=RATIO, backend="triton_paired"), "clip_mode: .*triton_paired"),
        (lambda s, t: loss(s, TopK(torch.zeros(9, 1, dtype=torch.int64), torch.zeros(9, 1)), objective=RATIO),
         "support: expected Support"),
    ],
)  # fmt: skip
def test_where_it_is_refused(call: Any, words: str) -> None:
    case = hidden_case(9, 31, 8).to(torch.float32)
    with pytest.raises(ValueError, match=words):
        call(case.student, case.teacher)


def test_the_default_is_the_forward_kl() -> None:
    case = hidden_case(9, 31, 8, gap=1.5).to(torch.float32)
    assert torch.equal(
        loss(case.student, case.teacher), loss(case.student, case.teacher, objective="forward_kl")
    )
    assert loss(case.student, case.teacher, objective="opsd") < loss(case.student, case.teacher)
    assert (token_stats(case.student, case.teacher).clipped_fraction == 0).all()

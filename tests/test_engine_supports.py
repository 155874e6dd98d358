"""Losses over K entries of the vocabulary against their dense definitions in `definitions.py`."""

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from definitions import assert_as_defined, clipped, define, entry_terms, exactly, log_probs
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_kernels import Hidden, Logits, Mixture, Objective, Routed, Support, loss, loss_and_stats
from opsd_kernels.objectives import OWNERS, RESTS
from opsd_kernels.testing import Case, Outcome, evaluate, hidden_case, logits_case

LEAD, N, V, H, K = (3, 5), 15, 37, 8, 4
DIVERGENCES = ("forward_kl", "reverse_kl", "reverse_kl_sg", "jsd")
CLIPS: list[dict[str, Any]] = [
    {},
    {"entry_clip": 0.05},
    {"entry_clip": 0.05, "clip_mode": "scale"},
    {"token_clip": 0.1},
    {"entry_clip": 0.05, "token_clip": 0.1, "clip_mode": "scale"},
]
MASK = torch.arange(N).reshape(LEAD) % 4 != 1
# Duplicates, places without an entry, and (in row 3) no entry at all.
GIVEN = torch.randint(-1, V, (*LEAD, 6), generator=torch.Generator().manual_seed(5))
GIVEN[..., 4] = GIVEN[..., 1]
GIVEN[0, 3] = -1


def _options(objective: Objective, **options: Any) -> dict[str, Any]:
    given = objective.support is not None and objective.support.of == "given"
    return {"objective": objective, **({"support_ids": GIVEN} if given else {}), **options}


def _support(of: str, rest: str, k: int = K) -> Support:
    return Support(None if of == "given" else k, of, rest)


def _assert_exact(case: Case, backend: str = "torch") -> Outcome:
    """In fp64 no rounding hides a wrong formula."""
    actual, expected = evaluate(partial(loss, backend=backend), case), exactly(case)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-10, atol=1e-12)
    for field, gradient in expected.gradients.items():
        torch.testing.assert_close(actual.gradients[field], gradient, rtol=1e-9, atol=1e-11)
    return actual


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("of", OWNERS)
def test_value_and_gradient(of: str, rest: str, divergence: str) -> None:
    """With every clip: in fp64 by both backends, several chunks, each reduction; in fp32 by the rule."""
    whole = hidden_case(LEAD, V, H, bias=True, softcap=9.0)
    for number, clip in enumerate(CLIPS):
        objective = Objective(divergence, beta=0.3, support=_support(of, rest), **clip)
        case = whole.having(**_options(objective, temperature=1.3))
        for reduction, backend in zip(("mean", "none"), ("torch", "reference"), strict=True):
            cut = case.having(reduction=reduction, workspace_bytes=2 * 4 * V * 8, mask=MASK)
            _assert_exact(cut, backend if number % 2 else "torch")
        assert_as_defined(case.to(torch.float32).having(reduction=("mean", "none")[number % 2]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("of", "rest"), product(OWNERS, RESTS))
def test_logits(of: str, rest: str, reduction: str) -> None:
    objective = Objective("jsd", support=_support(of, rest))
    case = logits_case(LEAD, V).having(**_options(objective, reduction=reduction, temperature=0.7))
    _assert_exact(case)
    assert_as_defined(case.to(torch.float32))


def _tokens(case: Case, dtype: torch.dtype) -> Outcome:
    student = case.student.with_tensors([x.to(dtype) for x in case.student.tensors])
    teacher = case.teacher.with_tensors([x.to(dtype) for x in case.teacher.tensors])
    return evaluate(loss, Case(student, teacher, {"reduction": "none", **case.options}), torch.ones(N))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("of", OWNERS)
def test_a_reverse_kl_over_a_part_leaks(of: str, backend: str) -> None:
    """Its gradient has p_j (1[j in K] - mass_K) / T too much, which raises the student's mass on the entries
    whatever the teacher says; that of "reverse_kl_sg" has not."""
    temperature = 1.3
    case = logits_case(N, V).having(temperature=temperature, reduction="none", backend=backend)
    ids = GIVEN.reshape(N, -1)
    options = {"support_ids": ids} if of == "given" else {}
    found = {}
    for divergence in ("reverse_kl", "reverse_kl_sg"):
        objective = Objective(divergence, support=_support(of, "drop"))
        found[divergence] = evaluate(loss, case.having(objective=objective, **options), torch.ones(N))
    assert torch.equal(found["reverse_kl"].loss, found["reverse_kl_sg"].loss)
    z_s, z_t = case.student.z, case.teacher.z
    top_s, top_t = (torch.zeros_like(z).bool().scatter(1, z.topk(K, 1).indices, True) for z in (z_s, z_t))
    inside = {
        "student": top_s,
        "teacher": top_t,
        "union": top_s | top_t,
        "intersection": top_s & top_t,
        "given": (ids[:, :, None] == torch.arange(V)).any(1),
    }[of]
    p = (z_s / temperature).softmax(1)
    mass = (p * inside).sum(1, keepdim=True)
    leak = p * (inside.double() - mass) / temperature
    assert leak.abs().max() > 0.01
    difference = found["reverse_kl"].gradients["z"] - found["reverse_kl_sg"].gradients["z"]
    torch.testing.assert_close(difference, leak, rtol=1e-9, atol=1e-13)


def test_the_leak_is_no_part_of_a_divergence() -> None:
    """With the tail both reverse KLs have one gradient, which is 0 where student and teacher agree; the
    dropped one is not 0 there."""
    z = logits_case(N, V).student.z
    for divergence, rest, nothing in (
        ("reverse_kl", "tail", True),
        ("reverse_kl", "renormalise", True),
        ("reverse_kl_sg", "drop", True),
        ("reverse_kl", "drop", False),
    ):
        objective = Objective(divergence, support=Support(K, "student", rest))
        outcome = _tokens(Case(Logits(z), Logits(z), {"objective": objective}), torch.float64)
        assert outcome.loss.abs().max() == 0
        assert (outcome.gradients["z"].abs().max() < 1e-15) == nothing


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("of", ["student", "teacher", "union", "intersection"])
@pytest.mark.parametrize("drop", [20.0, 30.0, 60.0, 85.0])
def test_peaked_rows(drop: float, of: str, divergence: str) -> None:
    """The tail has e^-drop of the mass (2e-9, 9e-14, 9e-27, 1e-37): fp32 has no digit of 1 - mass left."""
    generator = torch.Generator().manual_seed(int(drop))
    z_s, z_t = (torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in range(2))
    z_s[:, :K] += drop + 3 + torch.arange(K)
    z_t[:, :K] += drop + 3 - torch.arange(K) / 3
    z_s, z_t = z_s.float(), z_t.float()
    objective = Objective(divergence, beta=0.4, support=Support(K, of, "tail"))
    case = Case(Logits(z_s), Logits(z_t), {"objective": objective})
    actual, expected = _tokens(case, torch.float32), exactly(case.having(reduction="none"), torch.ones(N))
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=2e-6, atol=1e-7)
    found, truth = actual.gradients["z"].double(), expected.gradients["z"]
    assert torch.isfinite(found).all()
    # Not only the entries: each column of the tail keeps five digits of its own. The sum of the weights a_v of
    # the others enters it, which is what it cannot be better than; below 1e-37 fp32 is subnormal.
    assert (found - truth).abs().max() <= 1e-6
    tail = truth[:, K:]
    torch.testing.assert_close(found[:, K:], tail, rtol=1e-4, atol=max(1e-43, 1e-6 * float(tail.abs().max())))


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("of", ["student", "teacher", "union", "intersection"])
@pytest.mark.parametrize("k", [7, 8, 1000])
def test_as_many_entries_as_columns(k: int, of: str, rest: str, backend: str) -> None:
    """K >= V is the whole vocabulary, whatever happens to a rest of nothing."""
    case = logits_case(3, 7).to(torch.float32)
    for divergence in ("forward_kl", "jsd") if backend != "triton" else ("reverse_kl",):
        dense = evaluate(loss, case.having(objective=Objective(divergence), backend=backend))
        objective = Objective(divergence, support=Support(k, of, rest))
        outcome = evaluate(loss, case.having(objective=objective, backend=backend))
        torch.testing.assert_close(outcome.loss, dense.loss, rtol=3e-6, atol=1e-7)
        torch.testing.assert_close(outcome.gradients["z"], dense.gradients["z"], rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rest", RESTS)
def test_a_row_without_entries(rest: str, divergence: str, backend: str) -> None:
    """Where no entry is in both top-K, or none is given: loss and gradient are 0, the other rows' are not."""
    z_s, z_t = (x.clone() for x in (logits_case(2, V).student.z, logits_case(2, V).teacher.z))
    z_s[1, :K] += 40
    z_t[1, K : 2 * K] += 40
    for support, given_ids in (
        (Support(K, "intersection", rest), None),
        (Support(None, "given", rest), torch.tensor([[3, 4, -1], [-1, -1, -1]])),
    ):
        options = {"objective": Objective(divergence, support=support), "reduction": "none"}
        case = Case(Logits(z_s), Logits(z_t), {**options, "support_ids": given_ids})
        outcome = evaluate(partial(loss, backend=backend), case, torch.ones(2))
        assert outcome.loss[0].abs() > 1e-4
        assert outcome.gradients["z"][0].abs().max() > 1e-4
        assert outcome.loss[1].abs() < 1e-12
        assert outcome.gradients["z"][1].abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("of", "rest"), product(OWNERS, RESTS))
def test_excluded_columns(of: str, rest: str, backend: str) -> None:
    """Columns of -inf on both sides change nothing, also where K reaches into them."""
    case = logits_case(4, 9)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    z_s, z_t = (torch.nn.functional.pad(x.z, (0, 6), value=-torch.inf) for x in (case.student, case.teacher))
    place = order.argsort()  # where a column went
    ids = torch.tensor([[0, 3, 8, -1], [1, 1, 2, 7], [-1, -1, 5, 6], [8, 0, 4, 3]])
    given_ids = torch.where(ids < 0, ids, place[ids.clamp(min=0)])
    given_ids = torch.cat((given_ids, place[9:11].expand(4, 2)), 1)  # and two excluded ones
    for k in (3, 12):
        objective = Objective("jsd", beta=0.3, support=_support(of, rest, k))
        options = {"objective": objective, "backend": backend}
        padded = Case(Logits(z_s[:, order]), Logits(z_t[:, order]), options)
        plain = case.having(**options)
        if of == "given":
            plain, padded = plain.having(support_ids=ids), padded.having(support_ids=given_ids)
        found, expected = evaluate(loss, padded), evaluate(loss, plain)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-10, atol=1e-13)
        gradient = found.gradients["z"][:, place]
        torch.testing.assert_close(gradient[:, :9], expected.gradients["z"], rtol=1e-9, atol=1e-13)
        assert (gradient[:, 9:] == 0).all()

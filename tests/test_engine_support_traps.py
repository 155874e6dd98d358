"""Losses over K entries where they are known to go wrong: leaks, vanishing tails, empty and tied supports."""

from functools import partial
from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from definitions import exactly, objective_of
from fuzzing import fuzz
from opsd_kernels import Logits, Objective, Support, loss
from opsd_kernels.divergences import table
from opsd_kernels.objectives import OWNERS, RESTS
from opsd_kernels.testing import Case, Outcome, evaluate, logits_case

N, V, K = 15, 37, 4
DIVERGENCES = tuple(table())
GIVEN = torch.randint(-1, V, (N, 6), generator=torch.Generator().manual_seed(5))


def _support(of: str, rest: str, k: int = K) -> Support:
    return Support(None if of == "given" else k, of, rest)


def _tokens(case: Case, dtype: torch.dtype) -> Outcome:
    student = case.student.with_tensors([x.to(dtype) for x in case.student.tensors])
    teacher = case.teacher.with_tensors([x.to(dtype) for x in case.teacher.tensors])
    return evaluate(loss, Case(student, teacher, {"reduction": "none", **case.options}), torch.ones(N))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("of", OWNERS)
def test_a_reverse_kl_over_a_part_leaks(of: str, backend: str) -> None:
    """Its gradient has p_j (1[j in K] - mass_K) / T too much, that of the student's mass on the entries,
    whatever the teacher says; that of "reverse_kl_sg" has not."""
    temperature = 1.3
    case = logits_case(N, V).having(temperature=temperature, reduction="none", backend=backend)
    ids = GIVEN
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
    objective = objective_of(divergence, beta=0.4, support=Support(K, of, "tail"))
    case = Case(Logits(z_s), Logits(z_t), {"objective": objective})
    actual, expected = _tokens(case, torch.float32), exactly(case.having(reduction="none"), torch.ones(N))
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=2e-6, atol=1e-7)
    found, truth = actual.gradients["z"].double(), expected.gradients["z"]
    assert torch.isfinite(found).all()
    # Not only the entries: each column of the tail keeps digits of its own. The sum of all weights a_v enters
    # it, which is what it cannot be better than; below 1e-38 fp32 is subnormal.
    assert (found - truth).abs().max() <= 1e-6
    tail = truth[:, K:]
    torch.testing.assert_close(found[:, K:], tail, rtol=1e-4, atol=max(1e-43, 1e-6 * float(tail.abs().max())))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("of", ["student", "teacher", "union", "intersection"])
@pytest.mark.parametrize("k", [7, 8, 1000])
def test_as_many_entries_as_columns(k: int, of: str, rest: str, backend: str) -> None:
    """K >= V is the whole vocabulary, whatever happens to a rest of nothing."""
    case = logits_case(3, 7).to(torch.float32)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
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
    case = logits_case(2, V, gap=3.0)
    z_s, z_t = (source.z.clone() for source in (case.student, case.teacher))
    z_s[1, :K] += 40
    z_t[1, K : 2 * K] += 40
    for support, given_ids in (
        (Support(K, "intersection", rest), None),
        (Support(None, "given", rest), torch.tensor([[3, 4, -1], [-1, -1, -1]])),
    ):
        options = {"objective": Objective(divergence, support=support), "reduction": "none"}
        case = Case(Logits(z_s), Logits(z_t), {**options, "support_ids": given_ids})
        outcome = evaluate(partial(loss, backend=backend), case, torch.ones(2))
        assert outcome.loss[0].abs() > 1e-5
        assert outcome.gradients["z"][0].abs().max() > 1e-5
        assert outcome.loss[1].abs() < 1e-12
        assert outcome.gradients["z"][1].abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("of", "rest"), list(product(OWNERS, RESTS)))
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


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("divergence", "rest"), list(product(DIVERGENCES, RESTS)))
def test_ties(divergence: str, rest: str, backend: str) -> None:
    """Which of equal logits are taken is open; what is computed is the loss of one such choice, with its
    gradient, and never of more or fewer entries."""
    z_s, z_t = (source.z[:1, :6].clone() for source in (logits_case(1, 6).student, logits_case(1, 6).teacher))
    z_s[0, [1, 3, 4]] = z_s.max() + 1
    z_s[0, 5] = z_s.max() + 1
    objective = Objective(divergence, support=Support(3, "student", rest))
    found = evaluate(partial(loss, backend=backend), Case(Logits(z_s), Logits(z_t), {"objective": objective}))
    matches = 0
    for pair in combinations([1, 3, 4], 2):
        options = {
            "objective": Objective(divergence, support=Support(None, "given", rest)),
            "support_ids": torch.tensor([[5, *pair]]),
        }
        choice = exactly(Case(Logits(z_s), Logits(z_t), options))
        same = torch.isclose(found.loss, choice.loss, rtol=1e-9, atol=0)
        same &= torch.allclose(found.gradients["z"], choice.gradients["z"], rtol=1e-8, atol=1e-13)
        matches += int(same)
    assert matches == 1
    flat = Case(Logits(torch.zeros(3, V)), Logits(torch.zeros(3, V)), {"objective": objective})
    nothing = evaluate(partial(loss, backend=backend), flat)
    assert nothing.loss.abs() < 1e-7 or rest == "renormalise_teacher"
    if (divergence, rest) in product(DIVERGENCES, ("tail", "renormalise")):
        assert nothing.gradients["z"].abs().max() < 1e-7


clips = st.sampled_from([None, 0.02, 0.3])
objectives = st.builds(
    objective_of,
    st.sampled_from(DIVERGENCES),
    beta=st.sampled_from([0.2, 0.5, 0.9]),
    entry_clip=clips,
    clip_mode=st.sampled_from(["zero", "scale"]),
    token_clip=clips,
    support=st.builds(
        lambda of, rest, k: _support(of, rest, k),
        st.sampled_from(OWNERS),
        st.sampled_from(RESTS),
        st.integers(1, 12),
    ),
)


def _drawn(n: int, vocab: int, objective: Objective, gap: float, seed: int, **options: Any) -> Case:
    case = logits_case(n, vocab, gap=gap, seed=seed).having(objective=objective, **options)
    if objective.support is not None and objective.support.of == "given":
        generator = torch.Generator().manual_seed(seed)
        case = case.having(support_ids=torch.randint(-1, vocab, (n, 1 + seed % 7), generator=generator))
    return case


@fuzz(
    100,
    n=st.integers(1, 5),
    vocab=st.integers(1, 30),
    objective=objectives,
    gap=st.sampled_from([1e-2, 0.3, 3.0]),
    reduction=st.sampled_from(["mean", "none"]),
    seed=st.integers(0, 2**16),
)
def test_any_support(n: int, vocab: int, objective: Objective, gap: float, reduction: str, seed: int) -> None:
    case = _drawn(n, vocab, objective, gap, seed, reduction=reduction, workspace_bytes=2 * 2 * vocab * 8)
    actual, expected = evaluate(loss, case), exactly(case)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(actual.gradients["z"], expected.gradients["z"], rtol=1e-8, atol=1e-13)


@fuzz(
    30,
    n=st.integers(1, 2),
    vocab=st.integers(1, 40),
    objective=objectives,
    gap=st.sampled_from([1e-2, 0.3, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_any_support_in_triton(n: int, vocab: int, objective: Objective, gap: float, seed: int) -> None:
    """Within a few ulp of the logits (16) in fp32, which is what a log-probability has."""
    case = _drawn(n, vocab, objective, gap, seed).to(torch.float32)
    actual = evaluate(partial(loss, backend="triton"), case, torch.ones(()))
    expected = exactly(case, torch.ones(()))
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(actual.gradients["z"].double(), expected.gradients["z"], rtol=0, atol=4e-6)

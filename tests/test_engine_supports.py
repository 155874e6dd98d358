"""Losses over K entries of the vocabulary against their dense definitions in `definitions.py`."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

from definitions import assert_as_defined, clipped, define, entry_terms, exactly, log_probs, objective_of
from opsd_kernels import Mixture, Objective, Routed, Support, loss, loss_and_stats
from opsd_kernels.divergences import table
from opsd_kernels.objectives import OWNERS, RESTS
from opsd_kernels.testing import Case, Outcome, evaluate, hidden_case, logits_case

LEAD, N, V, H, K = (3, 5), 15, 37, 8, 4
DIVERGENCES = tuple(table())
CLIPS: list[dict[str, Any]] = [
    {},
    {"entry_clip": 0.05},
    {"entry_clip": 0.05, "clip_mode": "scale"},
    {"token_clip": 0.1},
    {"entry_clip": 0.05, "token_clip": 0.1, "clip_mode": "scale"},
]
MASK = torch.arange(N).reshape(LEAD) % 4 != 1
WEIGHTS = torch.arange(N).reshape(LEAD) % 3 * 0.7 - 0.3
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
    actual, expected = evaluate(partial(loss, backend=backend), case), exactly(case)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-10, atol=1e-12)
    for field, gradient in expected.gradients.items():
        torch.testing.assert_close(actual.gradients[field], gradient, rtol=1e-9, atol=1e-11)
    return actual


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("of", OWNERS)
def test_value_and_gradient(of: str, rest: str, divergence: str) -> None:
    """With every clip, in fp64, where no rounding hides a wrong formula; several chunks of rows."""
    whole = hidden_case(LEAD, V, H, bias=True, softcap=9.0)
    for clip in CLIPS:
        objective = objective_of(divergence, beta=0.3, support=_support(of, rest), **clip)
        case = whole.having(**_options(objective, temperature=1.3, mask=MASK, token_weight=WEIGHTS))
        for reduction, backend in (("mean", "torch"), ("none", "torch"), ("sum", "reference")):
            _assert_exact(case.having(reduction=reduction, workspace_bytes=2 * 4 * V * 8), backend)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("of", OWNERS)
def test_fp32(of: str, rest: str, divergence: str) -> None:
    rows, vocab = 33, 257
    ids = torch.randint(-1, vocab, (rows, 9), generator=torch.Generator().manual_seed(5))
    whole = hidden_case(rows, vocab, 48, bias=True).to(torch.float32)
    for reduction, clip in (("mean", CLIPS[0]), ("none", CLIPS[-1])):
        objective = objective_of(divergence, beta=0.3, support=_support(of, rest), **clip)
        options = {"support_ids": ids} if of == "given" else {}
        assert_as_defined(whole.having(objective=objective, reduction=reduction, **options))


@pytest.mark.parametrize("divergence", ["reverse_kl", "skew_reverse", "skew_reverse_sg"])
def test_unlikely_entries_keep_their_digits(divergence: str) -> None:
    """Entries given at random have little mass; the error of dH is at most eager's, in the median."""
    rows, vocab, ratios = 33, 257, []
    for seed in range(6):
        ids = torch.randint(-1, vocab, (rows, 9), generator=torch.Generator().manual_seed(seed))
        beta = {} if divergence == "reverse_kl" else {"beta": 0.3}
        objective = Objective(divergence, support=_support("given", "renormalise"), **beta)
        case = hidden_case(rows, vocab, 48, bias=True, seed=seed).to(torch.float32)
        case = case.having(objective=objective, support_ids=ids)
        truth = exactly(case).gradients["hidden"]
        found = (evaluate(call, case) for call in (loss, partial(define, dtype=torch.float32)))
        ours, eager = ((one.gradients["hidden"] - truth).norm() for one in found)
        ratios.append(float(ours / eager))
    assert sorted(ratios)[3] <= 1.05


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("of", "rest"), list(product(OWNERS, RESTS)))
def test_logits(of: str, rest: str, reduction: str) -> None:
    objective = Objective("jsd", support=_support(of, rest))
    case = logits_case(LEAD, V).having(**_options(objective, reduction=reduction, temperature=0.7))
    _assert_exact(case)


def _triton(case: Case, tokens: int) -> None:
    """The kernels in Triton's interpreter, in fp32; few tokens are no yardstick, so that bounds are a few ulp
    of the logits (16) and of the largest gradient."""
    actual, expected = evaluate(partial(loss, backend="triton"), case), exactly(case)
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=4e-6, atol=4e-6)
    for field, gradient in expected.gradients.items():
        band = 2e-5 * max(float(gradient.abs().max()), 1e-2 / tokens)
        torch.testing.assert_close(actual.gradients[field].double(), gradient, rtol=0, atol=band)


@pytest.mark.parametrize(("of", "rest"), list(product(OWNERS, RESTS)))
def test_triton(of: str, rest: str) -> None:
    number = OWNERS.index(of) + RESTS.index(rest)
    divergence, clip = DIVERGENCES[number % len(DIVERGENCES)], CLIPS[number % 5]
    objective = objective_of(divergence, beta=0.3, support=_support(of, rest), **clip)
    few = torch.arange(N).reshape(LEAD) % 5 == 2
    case = hidden_case(LEAD, V, H, bias=True, softcap=12.0).to(torch.float32)
    reduction = ("mean", "none")[number % 2]
    _triton(case.having(**_options(objective, mask=few, temperature=1.3, reduction=reduction)), 3)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("of", "rest"), list(product(OWNERS, RESTS)))
def test_statistics(of: str, rest: str, backend: str) -> None:
    """The loss is that of `loss`; the clipped share is that of the support's terms, the rest as ever."""
    case = hidden_case(LEAD, V, H, bias=True, gap=2.0)
    # Against a teacher with all of its mass on the entries few terms of a reverse KL are positive.
    divergence = "forward_kl" if rest == "renormalise_teacher" else "reverse_kl"
    for clip in CLIPS:
        objective = Objective(divergence, support=_support(of, rest), **clip)
        case = case.having(**_options(objective, mask=MASK, backend=backend))
        value, stats = loss_and_stats(case.student, case.teacher, **case.options)
        torch.testing.assert_close(value, exactly(case).loss, rtol=1e-9, atol=0)
        ls, lt = (log_probs(x, MASK, None, 1.0, torch.float64) for x in (case.student, case.teacher))
        given_ids = GIVEN[MASK] if of == "given" else None
        terms = entry_terms(ls, lt, objective, given_ids)
        positive = terms.clamp(min=0)
        total = positive.sum(1)
        left = torch.where(total > 0, clipped(positive, objective.entry_clip, "zero").sum(1) / total, 1.0)
        token = clipped(terms, objective.entry_clip, "zero").sum(1)
        left = left * (clipped(token, objective.token_clip, "zero") / token).nan_to_num(1.0)
        if rest in ("tail", "renormalise"):
            total = terms.sum(1)
            left = torch.where(total > 0, clipped(token, objective.token_clip, "zero") / total, 1.0)
        torch.testing.assert_close(stats.clipped_fraction[MASK].double(), 1 - left, rtol=1e-6, atol=1e-6)
        assert bool(clip) == bool((1 - left > 1e-3).any())
        dense = entry_terms(ls, lt, Objective("reverse_kl")).sum(1)
        torch.testing.assert_close(stats.reverse_kl[MASK].double(), dense, rtol=1e-6, atol=1e-6)
        assert (stats.clipped_fraction[~MASK] == 0).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("of", OWNERS)
def test_combined_teachers(of: str, backend: str) -> None:
    """The entries are those of the whole teacher; routing sorts the rows, and given entries with them."""
    case = hidden_case(LEAD, V, H, bias=True)
    other = hidden_case(LEAD, V, 5, seed=9, bias=True).student
    mixture = Mixture([(0.4, other), (0.6, case.teacher)])
    index = torch.arange(N).reshape(LEAD) % 3
    for teacher in (mixture, Routed([other, mixture, case.teacher], index)):
        for reduction in ("mean", "none"):
            options = _options(Objective("jsd", support=_support(of, "tail")), mask=MASK, reduction=reduction)
            cut = {**options, "workspace_bytes": 2 * 4 * V * 8}
            _assert_exact(Case(case.student, teacher, cut), backend)


@pytest.mark.parametrize("of", OWNERS)
def test_columns_beyond_the_real_vocabulary_are_never_chosen(of: str) -> None:
    case = hidden_case(LEAD, V, H, bias=True)
    ids = GIVEN.clamp(max=V - 6)
    options = {"support_ids": ids} if of == "given" else {}
    for reduction in ("mean", "none"):
        objective = Objective("forward_kl", support=_support(of, "tail"))
        outcome = _assert_exact(
            case.having(objective=objective, vocab_size=V - 5, reduction=reduction, **options)
        )
        assert (outcome.gradients["weight"][V - 5 :] == 0).all()

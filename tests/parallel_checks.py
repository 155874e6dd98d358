"""Values and gradients over the slices of a vocabulary, as every rank of a group checks them."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from definitions import objective_of
from opsd_kernels import (
    Hidden,
    Logits,
    LogLinear,
    Objective,
    Routed,
    divergences,
    loss,
    loss_and_stats,
    parallel,
    token_logprobs,
    token_stats,
)
from opsd_kernels.testing import (
    Case,
    assert_accurate,
    evaluate,
    hidden_case,
    hidden_sources,
    logits_case,
    upstream_of,
)
from parallel_ranks import Ranks, check, leaves

CLIPPED = (
    "opsd",
    Objective("forward_kl", entry_clip=0.02, clip_mode="scale"),
    Objective("jsd", beta=0.1, entry_clip=0.01),
    Objective("reverse_kl", token_clip=0.1),
    Objective("forward_kl", token_clip=0.1, clip_mode="scale"),
    Objective("mixed", beta=0.4, entry_clip=0.05, token_clip=0.3, clip_mode="scale"),
    Objective("forward_kl", entry_clip=0.5, clip_mode="ratio"),
)


def _random(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7))


def _masked(case: Case, **options: Any) -> Case:
    lead = case.student.lead
    weights = _random(*lead) * 2 - 0.3
    return case.having(mask=_random(*lead) > 0.3, token_weight=weights, temperature=1.3, **options)


@check
def every_divergence_and_clip(ranks: Ranks) -> None:
    objectives = [objective_of(name, beta=0.3) for name in divergences.table()] + list(CLIPPED)
    for number, objective in enumerate(objectives):
        reduction = ("mean", "none", "sum")[number % 3]
        for dtype in (torch.float32, torch.bfloat16):
            case = hidden_case(19, 211, 12, bias=True, seed=number).to(dtype)
            ranks.assert_as_single(_masked(case, objective=objective, reduction=reduction))


@check
def every_kind_of_head(ranks: Ranks) -> None:
    cases = [
        hidden_case((3, 5), 97, 8, softcap=5.0, logit_scale=0.5),
        hidden_case((2, 3, 2), 131, 8, bias=True, softcap=3.0),
        hidden_case(11, 67, 8, teacher_width=20),
        logits_case((2, 7), 101),
    ]
    for case in cases:
        for options in ({}, {"reduction": "none"}, {"reduction": "mean", "denominator": 3.5}):
            ranks.assert_as_single(case.to(torch.float32).having(objective="jsd", **options))
            ranks.assert_as_single(case.to(torch.bfloat16).having(objective="jsd", **options))


@check
def parts_that_cancel(ranks: Ranks) -> None:
    """Rows of the head with a large part in common, as language models have: dL/dz sums to 0 over the
    vocabulary, so each rank's dH is large and their sum is not. It is rounded to bf16 after the sum."""
    case = hidden_case(16, 211, 12)
    student, teacher = hidden_sources(case)
    weight = student.weight + 4.0
    shifted = replace(case, student=replace(student, weight=weight), teacher=replace(teacher, weight=weight))
    ranks.assert_as_single(shifted.to(torch.bfloat16).having(objective="jsd", reduction="none"))


@check
def slices_of_any_size(ranks: Ranks) -> None:
    """Of one column, of none, and unequal ones, in chunks of one row and of several."""
    vocab = 45
    ends = [[0, 1, 45], [0, 45, 45], [0, 0, 45]] if ranks.world == 2 else [[0, 1, 2, 45], [0, 0, 45, 45]]
    case = hidden_case(9, vocab, 6, bias=True).to(torch.float32)
    for cuts in ends:
        for budget in (None, 1, 4 * 2 * 4 * vocab):
            for reduction in ("mean", "none"):
                here = case.having(reduction=reduction, workspace_bytes=budget)
                ranks.assert_as_single(here, cuts=cuts)


@check
def padding(ranks: Ranks) -> None:
    """Columns of -inf, and columns from `vocab_size` on, which may be all that a rank has."""
    case = hidden_case(9, 60, 6, bias=True).to(torch.float32)
    cuts = [0, 40, 60] if ranks.world == 2 else [0, 20, 40, 60]
    for size in (55, 40, 37):
        for reduction in ("mean", "none"):
            ranks.assert_as_single(case.having(vocab_size=size, reduction=reduction), cuts=cuts)
    student, teacher = hidden_sources(case)
    assert student.bias is not None
    bias = torch.where(torch.arange(60) < 40, student.bias, -torch.inf)
    excluded = replace(case, student=replace(student, bias=bias), teacher=replace(teacher, bias=bias))
    for reduction in ("mean", "none"):
        found = ranks.summed(evaluate(partial(ranks.loss, cuts=cuts), excluded.having(reduction=reduction)))
        options = {"reduction": reduction, "vocab_size": 40}
        wanted = evaluate(loss, excluded.having(**options))
        torch.testing.assert_close(found.loss, wanted.loss, rtol=2e-6, atol=1e-7)
        for name, gradient in wanted.gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-5, atol=1e-7)
    here = ranks.sliced(excluded.student, cuts)
    stats = parallel.token_stats(here, ranks.sliced(excluded.teacher, cuts), group=ranks.group)
    assert all(torch.isfinite(x).all() for name, x in stats._asdict().items() if "logprob" not in name)


@check
def no_rows_that_count(ranks: Ranks) -> None:
    for lead, options in ((0, {}), ((2, 0), {}), (4, {"mask": torch.zeros(4, dtype=torch.bool)})):
        for reduction in ("mean", "none"):
            case = hidden_case(lead, 31, 4, bias=True).to(torch.float32)
            if isinstance(lead, int) and lead:
                student, _ = hidden_sources(case)
                case = replace(case, student=replace(student, hidden=student.hidden * torch.nan))
            outcome = evaluate(ranks.loss, case.having(reduction=reduction, **options))
            assert (outcome.loss == 0).all()
            assert all((x == 0).all() for x in outcome.gradients.values())
            stats = parallel.token_stats(
                ranks.sliced(case.student), ranks.sliced(case.teacher), group=ranks.group, **options
            )
            assert stats.forward_kl.shape == case.student.lead


@check
def close_pairs(ranks: Ranks) -> None:
    """Equal ones have no loss at all; close ones keep their digits."""
    for objective in ("forward_kl", "reverse_kl", "jsd", Objective("alpha", beta=0.3), "opsd"):
        case = hidden_case(12, 801, 8, bias=True).to(torch.float32)
        case = case.having(objective=objective, reduction="none")
        assert (evaluate(ranks.loss, replace(case, teacher=case.student)).loss == 0).all()
        for gap in (1e-2, 1e-4) if objective != "opsd" else ():
            near = logits_case(300, 801, gap=gap).to(torch.float32)
            _assert_close_pair(ranks, near.having(objective=objective, reduction="none"))


def _assert_close_pair(ranks: Ranks, case: Case) -> None:
    """Never negative; the error of the gradient, which is that of rounding log s and log t, as a norm."""
    found = ranks.summed(evaluate(ranks.loss, case))
    upstream = upstream_of(found.loss)
    truth = evaluate(partial(loss, backend="reference"), case.to(torch.float64), upstream)
    single = evaluate(loss, case, upstream)
    assert (found.loss >= 0).all()
    assert_accurate("loss", found.loss, truth.loss, single.loss)
    error, yardstick = ((x.gradients["z"] - truth.gradients["z"]).norm() for x in (found, single))
    assert error <= 1.3 * yardstick


@check
def teachers_of_several_streams(ranks: Ranks) -> None:
    case = hidden_case(10, 73, 6, bias=True).to(torch.float32)
    student, teacher = hidden_sources(case)
    other = replace(teacher, hidden=teacher.hidden.flip(0))
    mix = 0.3 * torch.ones(10)
    for whole in (
        lambda f: LogLinear([(0.7, f(teacher)), (mix, f(other))]),
        lambda f: LogLinear([(0.7, f(teacher)), (0.3, f(student))], mix="logits"),
        lambda f: Routed([f(teacher), f(other)], torch.arange(10) % 2),
    ):
        here, there = leaves(student), leaves(student)
        mine = parallel.loss(ranks.sliced(here), whole(ranks.sliced), group=ranks.group, objective="jsd")
        single = loss(there, whole(lambda x: x), objective="jsd")
        (mine * 3).backward()
        (single * 3).backward()
        torch.testing.assert_close(mine, single, rtol=2e-6, atol=0)
        torch.testing.assert_close(here.hidden.grad, there.hidden.grad, rtol=2e-5, atol=1e-7)


@check
def statistics(ranks: Ranks) -> None:
    """Those of one process, and the loss beside them is the loss."""
    case = _masked(hidden_case((4, 9), 211, 12, bias=True)).to(torch.float32)
    options = {"mask": case.options["mask"], "token_ids": torch.arange(36).view(4, 9) * 5, "temperature": 1.3}
    s, t = hidden_sources(case)
    mine, theirs = ranks.sliced(s), ranks.sliced(t)
    for objective in CLIPPED:
        found = parallel.token_stats(mine, theirs, group=ranks.group, objective=objective, **options)
        wanted = token_stats(s, t, objective=objective, **options)
        for name, x, y in zip(found._fields, found, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=3e-6, atol=5e-7, msg=f"{name} of {objective}")
            ranks.assert_same(name, x)
        assert (found.top1_agreement == wanted.top1_agreement).all()
    assert 0 < found.top1_agreement.mean() < 1
    for reduction in ("mean", "none"):
        given = {**options, "reduction": reduction, "group": ranks.group}
        value, stats = parallel.loss_and_stats(mine, theirs, **given)
        assert torch.equal(value, parallel.loss(mine, theirs, **given))
        expected = loss_and_stats(s, t, **options, reduction=reduction)
        torch.testing.assert_close(stats.jsd, expected.stats.jsd, rtol=3e-6, atol=5e-7)


@check
def weights_by_a_function(ranks: Ranks) -> None:
    case = hidden_case(14, 97, 6).to(torch.float32)
    ids = torch.arange(14) * 6

    def weigh(stats: Any) -> torch.Tensor:
        return stats.teacher_entropy * (1 + stats.student_logprob.exp())

    for reduction in ("sum", "none"):
        here = case.having(token_weight=weigh, token_ids=ids, reduction=reduction, workspace_bytes=4 * 97 * 8)
        found, wanted = ranks.summed(evaluate(ranks.loss, here)), evaluate(loss, here)
        torch.testing.assert_close(found.loss, wanted.loss, rtol=3e-6, atol=0)
        for name, gradient in wanted.gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=2e-5, atol=1e-6)


@check
def log_probs_of_sampled_tokens(ranks: Ranks) -> None:
    """Also where p is next to 1, and 1 - p of an fp32 probability has no digit left."""
    for options in ({}, {"softcap": 4.0, "logit_scale": 0.7}):
        for dtype in (torch.float32, torch.bfloat16):
            case = hidden_case((6, 40), 149, 8, bias=True, peak=9.0, **options).to(dtype)
            ids = (torch.arange(240) * 7 % 149).view(6, 40)
            z = case.student.hidden.double() @ case.student.weight.double().T  # type: ignore[union-attr]
            ids[0] = z[0].argmax(-1)
            given = {"mask": _random(6, 40) > 0.2, "temperature": 0.8, "workspace_bytes": 8 * 149 * 50}

            def mine(student: Hidden, _teacher: Any, **kept: Any) -> torch.Tensor:
                return parallel.token_logprobs(ranks.sliced(student), group=ranks.group, **kept)

            def single(student: Hidden, _teacher: Any, **kept: Any) -> torch.Tensor:
                return token_logprobs(student, **kept)

            here = case.having(token_ids=ids, **given)
            found, yardstick = ranks.summed(evaluate(mine, here)), evaluate(single, here)
            truth = evaluate(
                partial(single, backend="reference"), here.to(torch.float64).having(workspace_bytes=None)
            )
            assert_accurate("log-probs", found.loss, truth.loss, yardstick.loss)
            for name, gradient in truth.gradients.items():
                assert_accurate(f"d{name}", found.gradients[name], gradient, yardstick.gradients[name])


@check
def a_large_logit_far_from_the_others(ranks: Ranks) -> None:
    """Whose exponential would overflow, on one rank only."""
    z = torch.zeros(3, 40)
    z[0, 39], z[1, 0], z[2] = 3e4, 500.0, -3e4
    t = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    case = Case(Logits(z), Logits(t))
    for objective in ("reverse_kl", "jsd"):
        found = ranks.summed(evaluate(ranks.loss, case.having(objective=objective, reduction="none")))
        wanted = evaluate(loss, case.having(objective=objective, reduction="none"))
        torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.gradients["z"], wanted.gradients["z"], rtol=1e-5, atol=1e-7)
        assert math.isfinite(found.loss.sum())

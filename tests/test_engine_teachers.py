"""Teachers made of several sources against their definitions in `definitions.py`.

`softmax(sum a_k z_k / T)`, `sum w_k softmax(z_k / T)` and another teacher for each token: value and the
gradients of hidden states, head and bias.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from definitions import assert_as_defined, define, exactly, log_probs
from opsd_kernels import (
    Logits,
    LogLinear,
    Objective,
    Routed,
    loss,
    loss_and_stats,
    token_stats,
)
from opsd_kernels.backends.triton import tiles
from opsd_kernels.testing import Case, Outcome, evaluate
from teacher_cases import CHUNKS_OF_4, FEW, LEAD, MASK, NUMBERS, SIGNED, TEACHERS, WEIGHTS, V, World

# Where the student is one of the streams, or streams meet in one product, rounding errors of z that eager's
# student and teacher share cancel in z_t - z_s. The engine has 1 to 1.5 times eager's error, up to 2.6 times.
_assert_accurate = partial(assert_as_defined, allowance=2.0)


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    saved = tiles.DEFAULT
    tiles.DEFAULT = tiles.Tiles(block=64, stats_block=64, splits=2, filter_rows=2, filter_block=16)
    yield
    tiles.DEFAULT = saved


def _case(world: World, name: str, **options: Any) -> Case:
    """Four rows a chunk. A loss per token recomputes logits in its backward, which a product of another shape
    rounds in another way: there the yardstick holds for one chunk, and `test_fp64` is for several."""
    workspace = None if options.get("reduction") == "none" else CHUNKS_OF_4
    options = {"objective": "forward_kl", "workspace_bytes": workspace, **options}
    return Case(world.student, world.teacher(name), options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", TEACHERS)
def test_value_and_gradients(name: str, reduction: str) -> None:
    case = _case(World(bias=True, logit_scale=0.8), name, reduction=reduction, temperature=1.3)
    _assert_accurate(case.having(objective=Objective("jsd", beta=0.3)))
    _assert_accurate(case.having(mask=MASK, token_weight=WEIGHTS))


@pytest.mark.parametrize(
    "head", [{}, {"softcap": 5.0}, {"bias": True, "softcap": 4.0, "logit_scale": 1.5}], ids=str
)
@pytest.mark.parametrize("name", TEACHERS)
def test_heads(name: str, head: dict[str, Any]) -> None:
    """A soft-cap bends, so hidden states of a shared head must not be mixed."""
    _assert_accurate(_case(World(**head), name, temperature=0.7))


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize(
    "objective",
    [
        Objective("reverse_kl"),
        Objective("forward_kl", entry_clip=0.05, clip_mode="scale"),
        Objective("jsd", token_clip=0.2),
    ],
    ids=str,
)
def test_objectives(name: str, objective: Objective) -> None:
    world = World()
    # A reverse KL to a teacher without one of the student's columns is infinite.
    world.logits = lambda k: Logits(world.own(k).hidden @ world.own(k).weight.T)  # type: ignore[method-assign]
    _assert_accurate(_case(world, name, objective=objective))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("rows", [[0], [14, 3, 7, 8], list(range(33)), []], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_rows(name: str, rows: list[int], backend: str) -> None:
    for reduction in ("mean", "none"):
        case = _case(
            World(torch.float64, bias=True), name, rows=torch.tensor(rows).int(), reduction=reduction
        )
        outcome = _assert_exact(case, backend)
        if not rows:
            assert outcome.loss.abs().max() == 0
            assert all(gradient.abs().max() == 0 for gradient in outcome.gradients.values())


def _assert_exact(case: Case, backend: str) -> Outcome:
    """In fp64 no rounding hides a wrong factor."""
    actual, expected = evaluate(partial(loss, backend=backend), case), exactly(case)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-10, atol=1e-12)
    for field, gradient in expected.gradients.items():
        torch.testing.assert_close(actual.gradients[field], gradient, rtol=1e-9, atol=1e-11)
    return actual


@pytest.mark.parametrize("name", TEACHERS)
def test_bf16(name: str) -> None:
    _assert_accurate(_case(World(torch.bfloat16, bias=True), name))


@pytest.mark.parametrize(
    ("name", "reduction"), list(zip(FEW, ("none", "mean", "none", "mean", "mean"), strict=True))
)
def test_triton(name: str, reduction: str) -> None:
    """Three tokens are too few for a yardstick; in logits of 16 an ulp is 2e-6."""
    few = NUMBERS % 11 == 2
    case = _case(World(bias=True), name, mask=few, temperature=1.3, reduction=reduction)
    actual, expected = evaluate(partial(loss, backend="triton"), case), exactly(case)
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=2e-6, atol=2e-6)
    for field, gradient in expected.gradients.items():
        band = 5e-6 * float(gradient.abs().max())
        torch.testing.assert_close(actual.gradients[field].double(), gradient, rtol=0, atol=band)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", TEACHERS)
def test_fp64(name: str, backend: str) -> None:
    """Also several chunks, and slabs of the vocabulary where the backward recomputes by them."""
    case = _case(World(torch.float64, bias=True), name, mask=MASK, token_weight=WEIGHTS, temperature=1.3)
    for reduction in ("mean", "none"):
        _assert_exact(case.having(reduction=reduction, workspace_bytes=2 * CHUNKS_OF_4), backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", FEW)
def test_padding_is_cut(name: str, backend: str) -> None:
    """Columns from `vocab_size` on are in no softmax of any stream, and have no gradient."""
    case = _case(World(bias=True), name, vocab_size=V - 5)
    outcome = _assert_accurate(case, backend=backend)
    assert outcome.gradients["weight"][V - 5 :].abs().max() == 0
    assert outcome.gradients["bias"][V - 5 :].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixing_hidden_states_is_mixing_logits(dtype: torch.dtype) -> None:
    world = World(dtype, bias=True, logit_scale=0.7)
    streams = [(SIGNED, world.shared(1)), (0.6, world.shared(2)), (-0.3, world.me())]
    auto, by_logits = (
        evaluate(loss, Case(world.student, LogLinear(streams, mix=mix), {"objective": "jsd"}))
        for mix in ("auto", "logits")
    )
    torch.testing.assert_close(auto.loss, by_logits.loss, rtol=2e-6, atol=0)
    for field, gradient in by_logits.gradients.items():
        band = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(
            auto.gradients[field], gradient, rtol=band, atol=band * float(gradient.abs().max())
        )


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("mix", ["auto", "logits"])
def test_the_student_as_its_own_teacher(mix: str, backend: str) -> None:
    """Factor 1: nothing to learn, to the last bit. Factor 2 at T is the student at T / 2."""
    world = World(bias=True)
    z = Logits(torch.randn(*LEAD, V, generator=torch.Generator().manual_seed(0)))
    for student, same in ((world.student, world.me()), (z, Logits(z.z.detach()))):
        case = Case(student, LogLinear([(1.0, same)], mix=mix), {"objective": "jsd"})
        outcome = evaluate(partial(loss, backend=backend), case)
        assert outcome.loss.abs() <= (0 if backend == "torch" else 1e-7)
        assert all(gradient.abs().max() <= 1e-7 for gradient in outcome.gradients.values())
        sharper = replace(case, teacher=LogLinear([(2.0, same)], mix=mix))
        _assert_accurate(sharper, backend=backend)


def test_the_student_learns_although_it_is_in_its_teacher() -> None:
    """Its stream is a constant: no gradient flows through the teacher, whoever forgot to detach the head."""
    world = World()
    outcome = _assert_accurate(_case(world, "student in a shared head"))
    head = world.student.weight.clone().requires_grad_()
    hidden = world.student.hidden.clone().requires_grad_()
    student = replace(world.student, weight=head, hidden=hidden)
    me = replace(world.student, weight=head, hidden=hidden.detach())
    other = replace(world.shared(1), weight=head)
    value = loss(student, LogLinear([(0.4, me), (0.8, other)]), objective="forward_kl")
    value.backward(torch.tensor(-1.5))
    torch.testing.assert_close(head.grad, outcome.gradients["weight"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(hidden.grad, outcome.gradients["hidden"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_routed_teacher_reads_its_own_rows_alone(reduction: str, backend: str) -> None:
    """NaN in the rows of others, masked rows and a source that nobody is sent to do no harm."""
    world = World()
    index = NUMBERS % 2 * 2
    clean = [world.shared(0), world.shared(1), world.own(1)]
    dirty = []
    for number, source in enumerate(clean):
        read = ((index == number) & MASK)[..., None]
        dirty.append(replace(source, hidden=torch.where(read, source.hidden, torch.nan)))
    options = {"objective": "jsd", "mask": MASK, "reduction": reduction}
    outcome = _assert_accurate(Case(world.student, Routed(dirty, index), options), backend=backend)
    whole = _assert_accurate(Case(world.student, Routed(clean, index), options), backend=backend)
    assert torch.equal(outcome.loss, whole.loss)
    assert torch.equal(outcome.gradients["weight"], whole.gradients["weight"])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_what_is_said_of_a_token_stays_with_it(backend: str) -> None:
    """Routing sorts the rows; sampled tokens, statistics and their weights stay in the caller's order."""
    world = World()
    ids = NUMBERS * 2
    teacher = world.teacher("routed to everything")
    options: dict[str, Any] = {"objective": "forward_kl", "token_ids": ids, "backend": backend, "mask": MASK}
    stats = token_stats(world.student, teacher, **options)
    expected = define(world.student, teacher, objective="forward_kl", mask=MASK, reduction="none")
    torch.testing.assert_close(stats.forward_kl.double(), expected, rtol=1e-5, atol=1e-6)
    ls, lt = (_log_probs_of(source) for source in (world.student, teacher))
    for found, truth in ((stats.student_logprob, ls), (stats.teacher_logprob, lt)):
        picked = truth.gather(-1, ids[..., None])[..., 0]
        torch.testing.assert_close(found.double(), torch.where(MASK, picked, 0.0), rtol=1e-5, atol=1e-5)
    weight = 1 + stats.student_entropy
    assert not torch.isclose(weight[MASK][1:], weight[MASK][:-1], rtol=1e-3).all()
    for reduction in ("sum", "none"):
        by_function = evaluate(
            partial(loss, token_weight=lambda s: 1 + s.student_entropy, reduction=reduction, **options),
            Case(world.student, teacher),
        )
        given = partial(loss, token_weight=weight, reduction=reduction, **options)
        by_tensor = evaluate(given, Case(world.student, teacher))
        torch.testing.assert_close(by_function.loss, by_tensor.loss, rtol=1e-6, atol=1e-7)
        for field, gradient in by_tensor.gradients.items():
            torch.testing.assert_close(by_function.gradients[field], gradient, rtol=1e-5, atol=1e-6)


def _log_probs_of(source: Any) -> Tensor:
    keep = torch.ones(LEAD, dtype=torch.bool)
    return log_probs(source, keep, None, 1.0, torch.float64).reshape(*LEAD, V)


@pytest.mark.parametrize("name", TEACHERS)
def test_statistics(name: str) -> None:
    world = World(bias=True)
    case = _case(world, name, mask=MASK, temperature=1.3)
    value, stats = loss_and_stats(case.student, case.teacher, **case.options)
    tokens = define(case.student, case.teacher, **{**case.options, "reduction": "none"})
    torch.testing.assert_close(stats.forward_kl.double(), tokens, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value.double(), tokens.sum() / MASK.sum(), rtol=1e-5, atol=1e-6)

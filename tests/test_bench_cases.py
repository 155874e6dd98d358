"""What the benchmark compares: its cases, and contenders that compute the loss they say."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import arguments, tables
from bench.cases import Case, Inputs
from bench.contenders import CONTENDERS, EAGER, FLOOR, Contender, choose
from bench.exact import compare, semantics
from bench_samples import TINY, named


def options(*words: str) -> list[Case]:
    """The cases of a command line."""
    return arguments.cases(arguments.complete(arguments.parser().parse_args([*words, "--device", "cpu"])))


@pytest.mark.parametrize(
    "case", [TINY, replace(TINY, masked=0.5, temperature=2.0, beta=0.1)], ids=["plain", "options"]
)
@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jsd", "opsd"])
@pytest.mark.parametrize(
    "contender",
    [
        pytest.param(one, id=one.name, marks=[pytest.mark.slow] if one.compiles else [])
        for one in CONTENDERS
        if not one.cuda_only and not one.optional and one.name != FLOOR
    ],
)
def test_every_contender_computes_the_loss_it_says(contender: Contender, objective: str, case: Case) -> None:
    # A redundant contender computes the same loss, so ask as if nothing were redundant.
    case = replace(case, objective=objective)
    reason = replace(contender, redundant=None).why_not(case)
    if reason is not None:
        pytest.skip(reason)
    errors = semantics(contender, case)
    assert errors.other_loss is None
    assert errors.value < 1e-4
    assert errors.dh < 1e-4
    assert errors.dw is not None
    assert errors.dw < 1e-4


@pytest.mark.parametrize(
    "change",
    [{"objective": "reverse_kl"}, {"objective": "jsd"}, {"temperature": 1.3}, {"objective": "opsd"}],
)
def test_the_semantics_problem_tells_losses_apart(change: dict[str, object]) -> None:
    def other(inputs: Inputs, case: Case) -> torch.Tensor:
        return named(EAGER).function(inputs, replace(case, **change))  # type: ignore[arg-type]

    errors = semantics(Contender("other", other), TINY)
    assert errors.value > 0.04  # twice the tolerance
    assert errors.other_loss is not None


def test_compare_knows_length_from_direction() -> None:
    exact = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error, cosine = compare(1.1 * exact, exact)
    assert error == pytest.approx(0.1)
    assert cosine < 1e-15
    error, cosine = compare(-exact, exact)
    assert (error, cosine) == (pytest.approx(2.0), pytest.approx(2.0))
    assert compare(None, exact)[0] != compare(None, exact)[0]  # NaN, which no bound holds


def test_data_are_what_they_say() -> None:
    inputs = Inputs.of(replace(TINY, rows=400, vocab=2000, hidden=64, gap=0.1, masked=0.25))
    z_s, z_t = ((x @ inputs.head.T).detach() for x in (inputs.student, inputs.teacher))
    assert float((z_s - z_t).std()) == pytest.approx(0.1, rel=0.05)
    assert float(z_t.std()) == pytest.approx(7.5, rel=0.05)
    assert inputs.count == 300
    assert bool(inputs.mask[0])  # type: ignore[index]


def test_recorded_states_are_measured_on_their_own_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path) -> SimpleNamespace:
        assert path == Path("states.safetensors")
        states = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
        return SimpleNamespace(student=states[0], teacher=states[1], head=torch.randn(96, 8).bfloat16())

    monkeypatch.setitem(sys.modules, "bench.recorded", SimpleNamespace(load=load))  # type: ignore[arg-type]
    (case,) = options("--recorded", "states.safetensors", "--rows", "30", "--objectives", "jsd")
    assert (case.rows, case.vocab, case.hidden, case.dtype) == (30, 96, 8, "bfloat16")
    assert Inputs.of(case).student.shape == (30, 8)
    assert "recorded in states.safetensors" in tables.title(case)
    with pytest.raises(ValueError, match="at most the 40"):
        options("--recorded", "states.safetensors", "--rows", "50")


def test_presets_hold_the_shapes_of_the_goals() -> None:
    goals = options("--preset", "goals")
    shapes = {(case.rows, case.vocab, case.hidden, case.dtype) for case in goals}
    assert shapes == {(16384, 151936, hidden, "bfloat16") for hidden in (1024, 2048, 4096, 8192)}
    assert {case.gap for case in goals} == {1.0, 0.1}
    assert sum(not case.trainable_head for case in goals) == 4
    assert sum(case.masked == 0.5 for case in goals) == 4
    (one,) = options("--quick", "--objectives", "jsd", "--rows", "64")
    assert (one.rows, one.vocab, one.objective) == (64, 8192, "jsd")
    with pytest.raises(ValueError, match="--memory-limit"):
        options("--largest-n")


def test_the_yardsticks_are_always_there() -> None:
    names = [contender.name for contender in choose(["trl"])]
    assert names == [FLOOR, EAGER, "TRL chunked divergence", "TRL chunked divergence, 16384 rows"]
    assert not any(contender.compiles for contender in choose([], compiled=False))

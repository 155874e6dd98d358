"""Properties that hold for every input, on inputs that hypothesis makes up.

Under CI hypothesis draws the same cases every time (its own `ci` profile), so that a build is red for reasons
of its own; elsewhere every run draws new ones. A failure prints its case and the line that replays it.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from definitions import objective_of
from opsd_kernels import Logits, Objective, loss
from opsd_kernels.divergences import table
from opsd_kernels.testing import Case, evaluate, hidden_case, logits_case, logits_of, relative_error

few = partial(settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

objectives = st.builds(
    objective_of,
    st.sampled_from(list(table())),
    beta=st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0]),
    entry_clip=st.sampled_from([None, None, 0.05, 0.3]),
    clip_mode=st.sampled_from(["zero", "scale"]),
    token_clip=st.sampled_from([None, None, 0.1]),
)
smooth = st.builds(objective_of, st.sampled_from(list(table())), beta=st.sampled_from([0.1, 0.5, 0.7]))
temperatures = st.sampled_from([0.5, 1.0, 1.7])


@dataclass(frozen=True)
class Draw:
    """What a random call is made of. Sizes are small: shapes matter here, not magnitudes."""

    rows: int
    vocab: int
    seed: int
    objective: Objective
    temperature: float
    reduction: str
    dead: int
    workspace_rows: int

    def finish(self, case: Case) -> Case:
        """The case with every option drawn; `dead` of 3 rows are masked."""
        options: dict[str, Any] = {"objective": self.objective, "temperature": self.temperature}
        if self.dead:
            options["mask"] = torch.arange(self.rows) % 3 >= self.dead
        return case.having(
            reduction=self.reduction, workspace_bytes=self.workspace_rows * self.vocab * 8, **options
        )


draws = st.builds(
    Draw,
    rows=st.integers(1, 12),
    vocab=st.integers(2, 40),
    seed=st.integers(0, 2**31),
    objective=objectives,
    temperature=temperatures,
    reduction=st.sampled_from(["mean", "sum", "none"]),
    dead=st.integers(0, 2),
    workspace_rows=st.integers(1, 12),
)
smooth_draws = draws.flatmap(lambda draw: smooth.map(lambda objective: replace(draw, objective=objective)))


def _logits(draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    return logits_of(logits_case(draw.rows, draw.vocab, seed=draw.seed))


def _of(draw: Draw, z_s: torch.Tensor, z_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of logits."""
    outcome = evaluate(loss, draw.finish(Case(Logits(z_s), Logits(z_t))))
    return outcome.loss, outcome.gradients["z"]


def _same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@few(max_examples=150)
@given(
    draw=draws,
    width=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 6.0]),
    scale=st.sampled_from([1.0, 0.3]),
)
def test_hidden_states_match_the_reference(
    draw: Draw, width: int, dtype: torch.dtype, bias: bool, softcap: float | None, scale: float
) -> None:
    """In fp64, where no tolerance hides a wrong formula, and then finite in the drawn dtype."""
    head: dict[str, Any] = {"bias": bias, "softcap": softcap, "logit_scale": scale}
    case = draw.finish(hidden_case(draw.rows, draw.vocab, width, seed=draw.seed, **head))
    actual, expected = evaluate(loss, case), evaluate(partial(loss, backend="reference"), case)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-9, atol=1e-12)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(actual.gradients[name], gradient, rtol=1e-8, atol=1e-12)
    low = evaluate(loss, case.to(dtype))
    for name, gradient in low.gradients.items():
        assert torch.isfinite(gradient).all(), name


@few(max_examples=100)
@given(draw=draws, padding=st.integers(0, 5), everywhere=st.booleans())
def test_padding_is_no_part_of_the_vocabulary(draw: Draw, padding: int, everywhere: bool) -> None:
    z_s, z_t = _logits(draw)
    columns = torch.arange(draw.vocab + padding)
    if everywhere:
        order = torch.Generator().manual_seed(draw.seed)
        columns = torch.randperm(draw.vocab + padding, generator=order)
    padded = [torch.nn.functional.pad(z, (0, padding), value=-torch.inf)[:, columns] for z in (z_s, z_t)]
    value, gradient = _of(draw, *padded)
    real = columns < draw.vocab
    assert (gradient[:, ~real] == 0).all()
    _same((value, gradient[:, columns.argsort()[: draw.vocab]]), _of(draw, z_s, z_t))


@few(max_examples=60)
@given(draw=draws, shift=st.floats(-50, 50), which=st.sampled_from([(1, 0), (0, 1), (1, 1)]))
def test_a_constant_added_to_a_row_changes_nothing(draw: Draw, shift: float, which: tuple[int, int]) -> None:
    z_s, z_t = _logits(draw)
    shifts = torch.linspace(-1, 1, draw.rows, dtype=torch.float64)[:, None] * shift
    _same(_of(draw, z_s + which[0] * shifts, z_t + which[1] * shifts), _of(draw, z_s, z_t))


@few(max_examples=60)
@given(draw=draws)
def test_the_order_of_the_vocabulary_does_not_matter(draw: Draw) -> None:
    z_s, z_t = _logits(draw)
    order = torch.randperm(draw.vocab, generator=torch.Generator().manual_seed(draw.seed))
    value, gradient = _of(draw, z_s, z_t)
    _same(_of(draw, z_s[:, order], z_t[:, order]), (value, gradient[:, order]))


@few(max_examples=60)
@given(draw=draws)
def test_rows_do_not_see_each_other(draw: Draw) -> None:
    """Each row alone, and all of them in another order, under an upstream gradient of ones."""
    z_s, z_t = _logits(draw)
    summed = replace(draw, dead=0, reduction="none")
    case = summed.finish(Case(Logits(z_s), Logits(z_t)))
    together = evaluate(loss, case, torch.ones(draw.rows))
    order = torch.randperm(draw.rows, generator=torch.Generator().manual_seed(draw.seed))
    mixed = evaluate(
        loss, replace(case, student=Logits(z_s[order]), teacher=Logits(z_t[order])), torch.ones(draw.rows)
    )
    torch.testing.assert_close(mixed.loss, together.loss[order], rtol=1e-12, atol=1e-15)
    for row in range(draw.rows):
        alone = replace(case, student=Logits(z_s[row]), teacher=Logits(z_t[row]))
        outcome = evaluate(loss, alone, torch.ones(()))
        torch.testing.assert_close(outcome.loss, together.loss[row], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(
            outcome.gradients["z"], together.gradients["z"][row], rtol=1e-10, atol=1e-14
        )


@few(max_examples=60)
@given(draw=draws)
def test_the_gradient_of_a_row_of_logits_sums_to_zero(draw: Draw) -> None:
    """Also in fp32, where it is what `total` is divided by the mass for."""
    z_s, z_t = _logits(draw)
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        _, gradient = _of(draw, z_s.to(dtype), z_t.to(dtype))
        assert (gradient.sum(-1).abs() <= bound * draw.vocab).all()


@few(max_examples=60)
@given(draw=draws, factor=st.floats(-3, 3))
def test_the_loss_is_linear_in_the_token_weights(draw: Draw, factor: float) -> None:
    case = draw.finish(hidden_case(draw.rows, draw.vocab, 5, seed=draw.seed))
    generator = torch.Generator().manual_seed(draw.seed)
    a, b = torch.randn(2, draw.rows, generator=generator, dtype=torch.float64)
    upstream = torch.ones(case.student.lead if draw.reduction == "none" else ())
    parts = [evaluate(loss, case.having(token_weight=weight), upstream) for weight in (a, b)]
    whole = evaluate(loss, case.having(token_weight=a + factor * b), upstream)
    torch.testing.assert_close(whole.loss, parts[0].loss + factor * parts[1].loss, rtol=1e-9, atol=1e-12)
    for name, gradient in whole.gradients.items():
        first, second = (part.gradients[name] for part in parts)
        torch.testing.assert_close(gradient, first + factor * second, rtol=1e-9, atol=1e-12)


@few(max_examples=60)
@given(draw=smooth_draws)
def test_jsd_is_symmetric_when_its_beta_is_mirrored(draw: Draw) -> None:
    z_s, z_t = _logits(draw)
    beta = draw.objective.beta
    there = replace(draw, objective=Objective("jsd", beta=beta))
    back = replace(draw, objective=Objective("jsd", beta=1 - beta))
    torch.testing.assert_close(_of(there, z_s, z_t)[0], _of(back, z_t, z_s)[0], rtol=1e-9, atol=1e-14)
    bound = replace(draw, reduction="none", dead=0)
    tokens, _ = _of(replace(bound, objective=Objective("jsd", beta=0.5)), z_s, z_t)
    assert (tokens <= torch.tensor(2.0, dtype=torch.float64).log() + 1e-12).all()
    forward, _ = _of(replace(bound, objective=Objective("forward_kl")), z_s, z_t)
    reverse, _ = _of(replace(bound, objective=Objective("reverse_kl")), z_t, z_s)
    torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-14)


@few(max_examples=60)
@given(draw=smooth_draws, gap=st.sampled_from([1.0, 1e-2, 1e-4, 0.0]))
def test_a_divergence_is_never_negative(draw: Draw, gap: float) -> None:
    case = logits_case(draw.rows, draw.vocab, gap=gap, seed=draw.seed).to(torch.float32)
    tokens = evaluate(loss, draw.finish(case).having(reduction="none")).loss
    assert (tokens >= 0).all()
    if gap == 0:
        assert (tokens == 0).all()


@few(max_examples=60)
@given(draw=smooth_draws)
def test_bf16_gradients_are_right_but_for_rounding_them(draw: Draw) -> None:
    """An element is rounded by 2^-8 of itself at most; eager is wrong by per cents here.

    Where the terms of a gradient all but cancel, fp32's rounding of them, which the same loss has on the same
    inputs in fp32, comes on top.
    """
    case = draw.finish(hidden_case(draw.rows, draw.vocab, 6, seed=draw.seed)).to(torch.bfloat16)
    truth = evaluate(partial(loss, backend="reference"), case.to(torch.float64))
    outcome, finer = evaluate(loss, case), evaluate(loss, case.to(torch.float32))
    for name, gradient in truth.gradients.items():
        if gradient is not None and gradient.norm() > 0:
            cancelled = relative_error(finer.gradients[name], gradient)
            assert relative_error(outcome.gradients[name], gradient) <= 2**-8 + 1.1 * cancelled

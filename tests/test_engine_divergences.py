"""Every line of `divergences.def` against its paper's formula in fp64: values, gradients, clips, limits."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from definitions import objective_of
from opsd_kernels import Logits, Objective, Support, loss
from opsd_kernels.divergences import table
from opsd_kernels.testing import Case, Outcome, evaluate, logits_case
from triton_cases import small_blocks

N, V = 6, 40
BACKENDS = ("torch", "reference")
BETAS = (0.1, 0.5, 0.9)
# A formula without beta is looked at once.
PAIRS = [(name, beta) for name, one in table().items() for beta in BETAS if one.uses_beta or beta == 0.5]


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    with small_blocks(block=64, stats_block=64, splits=1):
        yield


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return p * (p / q).log()


def _mixture(s: Tensor, t: Tensor, beta: float) -> Tensor:
    return beta * t + (1 - beta) * s


def _jsd(s: Tensor, t: Tensor, beta: float) -> Tensor:
    m = _mixture(s, t, beta)
    return beta * _kl(t, m) + (1 - beta) * _kl(s, m)


TERMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": lambda s, t, beta: _kl(t, s),
    "reverse_kl": lambda s, t, beta: _kl(s, t),
    "reverse_kl_sg": lambda s, t, beta: s * (s.detach() / t).log(),
    "jsd": _jsd,
    "skew_forward": lambda s, t, beta: _kl(t, _mixture(s, t, beta)),
    "skew_reverse": lambda s, t, beta: _kl(s, _mixture(s, t, beta)),
    "skew_reverse_sg": lambda s, t, beta: _kl(s, _mixture(s.detach(), t, beta)),
    "total_variation": lambda s, t, beta: (s - t).abs() / 2,
    "alpha": lambda s, t, beta: (t**beta * s ** (1 - beta) - beta * t - (1 - beta) * s) / (beta * (beta - 1)),
    "mixed": lambda s, t, beta: beta * _kl(s, t) + (1 - beta) * _kl(t, s),
}
# What a column adds that the student excludes (of t), and one that the teacher excludes (of s).
WITHOUT_STUDENT: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda t, beta: 0 * t,
    "reverse_kl_sg": lambda t, beta: 0 * t,
    "jsd": lambda t, beta: -beta * math.log(beta) * t,
    "skew_forward": lambda t, beta: -math.log(beta) * t,
    "skew_reverse": lambda t, beta: 0 * t,
    "skew_reverse_sg": lambda t, beta: 0 * t,
    "total_variation": lambda t, beta: t / 2,
    "alpha": lambda t, beta: t / (1 - beta),
}
WITHOUT_TEACHER: dict[str, Callable[[Tensor, float], Tensor]] = {
    "forward_kl": lambda s, beta: 0 * s,
    "jsd": lambda s, beta: -(1 - beta) * math.log(1 - beta) * s,
    "skew_forward": lambda s, beta: 0 * s,
    "skew_reverse": lambda s, beta: -math.log(1 - beta) * s,
    # Of s (log s - log m) with m = (1 - beta) sg[s] the derivative by s is log(s / m) + 1.
    "skew_reverse_sg": lambda s, beta: s * (s / ((1 - beta) * s.detach())).log(),
    "total_variation": lambda s, beta: s / 2,
    "alpha": lambda s, beta: s / beta,
}


def _defined(z_s: Tensor, z_t: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Token losses and their gradient by z_s, from the terms as a function of s and t."""
    leaf = z_s.double().requires_grad_()
    tokens = of(leaf.softmax(1), z_t.double().softmax(1)).sum(1)
    (gradient,) = torch.autograd.grad(tokens.sum(), leaf)
    return tokens.detach(), gradient


def _found(z_s: Tensor, z_t: Tensor, objective: Objective, backend: str = "torch", **options: Any) -> Outcome:
    case = Case(Logits(z_s), Logits(z_t), {"objective": objective, "reduction": "none", **options})
    return evaluate(partial(loss, backend=backend), case, torch.ones(len(z_s)))


def _rows(gap: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    case = logits_case(N, V, gap=gap).to(dtype)
    return case.student.tensors[0], case.teacher.tensors[0]


def test_every_line_has_a_formula_here() -> None:
    assert list(TERMS) == list(table())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "beta"), PAIRS)
def test_value_and_gradient(name: str, beta: float, backend: str) -> None:
    """Far, near and close rows; the formulas themselves lose digits where the sum of their terms cancels."""
    for gap in (3.0, 0.3, 1e-4):
        z_s, z_t = _rows(gap)
        tokens, gradient = _defined(z_s, z_t, lambda s, t: TERMS[name](s, t, beta))
        found = _found(z_s, z_t, objective_of(name, beta), backend)
        torch.testing.assert_close(found.loss, tokens, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(found.gradients["z"], gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "beta", "backend"),
    [(*pair, "torch") for pair in PAIRS] + [(name, 0.1, "triton") for name in TERMS],
)
def test_close_rows_keep_their_digits(name: str, beta: float, backend: str) -> None:
    """fp32, rows 1e-2 apart: rounding log s and log t costs 1e-6 of a log-ratio, where the formula's terms
    of either sign would leave no more than 1e-3 of the value."""
    z_s, z_t = _rows(1e-2, torch.float32)
    exact, gradient = _defined(z_s, z_t, lambda s, t: TERMS[name](s, t, beta))
    found = _found(z_s, z_t, objective_of(name, beta), backend)
    rounding = 1e-7 if name == "total_variation" else 0.0  # of first order in the log-ratio
    torch.testing.assert_close(found.loss.double(), exact, rtol=5e-4, atol=rounding)
    assert (found.gradients["z"] - gradient).abs().max() < 1e-6 / min(beta, 1 - beta)
    same = _found(z_s, z_s, objective_of(name, beta), backend)
    assert (same.loss == 0).all()
    assert same.gradients["z"].abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["zero", "scale"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TERMS)
def test_clips(name: str, backend: str, mode: str) -> None:
    """An entry's signed term is what the formula has under its sum, not the form that keeps digits."""
    tau, z_s, z_t = 0.02, *_rows(1.0)

    def clipped(s: Tensor, t: Tensor) -> Tensor:
        terms = TERMS[name](s, t, 0.3)
        above = terms > tau
        assert above.any()
        kept = torch.full_like(terms, tau) if mode == "zero" else terms * (tau / terms).detach()
        return torch.where(above, kept, terms)

    tokens, gradient = _defined(z_s, z_t, clipped)
    found = _found(z_s, z_t, objective_of(name, 0.3, entry_clip=tau, clip_mode=mode), backend)
    torch.testing.assert_close(found.loss, tokens, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.gradients["z"], gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", TERMS)
def test_excluded_columns(name: str, side: str, backend: str) -> None:
    """One that a side excludes adds its limit or makes the row infinite; one that both exclude, nothing."""
    z_s, z_t = _rows(1.0, torch.float32 if backend == "triton" else torch.float64)
    (z_s if side == "student" else z_t)[:, :3] = -torch.inf
    z_s[:, 7], z_t[:, 7] = -torch.inf, -torch.inf
    limits: dict[str, Any] = WITHOUT_STUDENT if side == "student" else WITHOUT_TEACHER
    several = (0.05, 0.95) if backend == "triton" else (0.05, 0.3, 0.95)
    for beta in several if table()[name].uses_beta else (0.5,):
        found = _found(z_s, z_t, objective_of(name, beta), backend)
        if name not in limits:
            assert (found.loss == torch.inf).all()
            continue
        both = (z_s > -torch.inf) & (z_t > -torch.inf)

        def of(s: Tensor, t: Tensor, beta: float = beta, both: Tensor = both) -> Tensor:
            one = limits[name]((t if side == "student" else s)[:, :3], beta)
            return torch.cat((TERMS[name](s[both].view(N, -1), t[both].view(N, -1), beta), one), 1)

        tokens, gradient = _defined(z_s, z_t, of)
        close = {"rtol": 1e-5, "atol": 1e-6} if backend == "triton" else {"rtol": 1e-10, "atol": 1e-13}
        torch.testing.assert_close(found.loss.to(tokens), tokens, **close)
        torch.testing.assert_close(found.gradients["z"].to(tokens), gradient, **close)
        assert (found.gradients["z"][z_s == -torch.inf] == 0).all()


def test_the_share_of_distillm_is_that_of_the_first_distribution() -> None:
    """SKL = KL(p || alpha p + (1 - alpha) q), which alpha bounds by -log alpha, for p = t and for p = s."""
    z_s, z_t = _rows(30.0)
    alpha = 0.1
    for name, beta in (("skew_forward", alpha), ("skew_reverse", 1 - alpha), ("skew_reverse_sg", 1 - alpha)):
        s, t = z_s.softmax(1), z_t.softmax(1)
        p, q = (t, s) if name == "skew_forward" else (s, t)
        expected = _kl(p, alpha * p + (1 - alpha) * q).sum(1)
        found = _found(z_s, z_t, Objective(name, beta)).loss
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
        assert 0.8 * -math.log(alpha) < found.max() <= -math.log(alpha)
        assert _found(z_s, z_t, Objective(name, 1 - beta)).loss.max() <= -math.log(1 - alpha)


def test_ends_of_beta() -> None:
    """Where the formula is a KL divergence it is that one, to the last bit; Amari's goes there."""
    z_s, z_t = _rows(0.5)
    forward, reverse = (_found(z_s, z_t, Objective(name)) for name in ("forward_kl", "reverse_kl"))
    for name, beta, expected in (
        ("jsd", 0, forward), ("jsd", 1, reverse), ("mixed", 0, forward), ("mixed", 1, reverse),
        ("skew_forward", 0.0, forward), ("skew_reverse", 1.0, reverse), ("skew_reverse_sg", 1, reverse),
    ):  # fmt: skip
        found = _found(z_s, z_t, Objective(name, beta))
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.gradients["z"], expected.gradients["z"])
    for beta, expected in ((1 - 1e-6, forward), (1e-6, reverse)):
        found = _found(z_s, z_t, Objective("alpha", beta))
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.gradients["z"], expected.gradients["z"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("beta", "share"), [(0.9, 1e-40), (0.99, 1e-40), (0.1, 1e-40), (0.5, 1e-200)])
def test_a_geometric_mean_of_far_probabilities(beta: float, share: float) -> None:
    """Also where either side's power alone has left the range in which exponents are cut off."""
    p = torch.tensor([[share, 1.0]], dtype=torch.float64)
    for s, t in ((p, p.flip(1)), (p.flip(1), p)):
        expected = ((t**beta * s ** (1 - beta)).sum(1) - 1) / (beta * (beta - 1))
        found = _found(s.log(), t.log(), Objective("alpha", beta))
        torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
        _, gradient = _defined(s.log(), t.log(), lambda s, t: TERMS["alpha"](s, t, beta))
        torch.testing.assert_close(found.gradients["z"], gradient, rtol=1e-9, atol=1e-15)


def test_total_variation_of_peaked_rows() -> None:
    """Most tokens of a model: the top share is 1 in fp32 on both sides, and half of the sum is its."""
    z_s, z_t = torch.tensor([[0.0, -20.0, -21.0]]), torch.tensor([[0.0, -22.0, -21.5]])
    exact, _ = _defined(z_s, z_t, lambda s, t: TERMS["total_variation"](s, t, 0.5))
    found = _found(z_s, z_t, Objective("total_variation"))
    torch.testing.assert_close(found.loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", TERMS)
def test_a_nan_shows(name: str, backend: str) -> None:
    """In the loss and in the gradient, whichever side has it; the sign of NaN is not 0."""
    for side in (0, 1):
        pair = _rows(0.5, torch.float32)
        pair[side][1, 5] = torch.nan
        found = _found(*pair, Objective(name), backend)
        assert found.loss.isnan().tolist() == [row == 1 for row in range(N)]
        assert found.gradients["z"].isnan().any(1).tolist() == [row == 1 for row in range(N)]


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_a_teacher_renormalised_alone(backend: str) -> None:
    """sum_K q (log q - log s) with q = t / t(K) and s of the whole softmax; by hand dL/dz = (s - q) / T."""
    temperature, k = 1.3, 5
    z_s, z_t = _rows(1.0, torch.float32 if backend == "triton" else torch.float64)
    s, t = ((z.double() / temperature).softmax(1) for z in (z_s, z_t))
    top = torch.zeros_like(t, dtype=torch.bool).scatter(1, t.topk(k, 1).indices, True)
    q = torch.where(top, t, 0.0) / (t * top).sum(1, keepdim=True)
    tokens = torch.where(top, q * (q.clamp(min=1e-300) / s).log(), 0.0).sum(1)
    objective = Objective("forward_kl", support=Support(k, "teacher", "renormalise_teacher"))
    found = _found(z_s, z_t, objective, backend, temperature=temperature)
    close = {"rtol": 1e-5, "atol": 1e-6} if backend == "triton" else {"rtol": 1e-11, "atol": 1e-14}
    torch.testing.assert_close(found.loss.double(), tokens, **close)
    torch.testing.assert_close(found.gradients["z"].double(), (s - q) / temperature, **close)
    # The student has less mass on the entries than 1, so at s = t there is a loss of -log t(K).
    same, mass = _found(z_s, z_s, objective, backend).loss, z_s.double().softmax(1).topk(k, 1).values.sum(1)
    torch.testing.assert_close(same.double(), -mass.log(), **close)


def test_a_dropped_reverse_kl_is_not_stationary_at_the_teacher() -> None:
    """There its gradient is that of the student's mass on the entries, p_j (1[j in K] - p(K)) / T: descent
    lowers the mass although nothing is wrong. "reverse_kl_sg" has no gradient there."""
    temperature, k = 1.7, 4
    z, _ = _rows(1.0)
    p = (z / temperature).softmax(1)
    top = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(k, 1).indices, True)

    def mass(z: Tensor) -> Tensor:
        return ((z / temperature).softmax(1) * top).sum(1)

    def gradient(name: str) -> Tensor:
        objective = Objective(name, support=Support(k, "student", "drop"))
        return _found(z, z, objective, temperature=temperature).gradients["z"]

    found = gradient("reverse_kl")
    leak = p * (top.double() - mass(z)[:, None]) / temperature
    torch.testing.assert_close(found, leak, rtol=1e-9, atol=1e-15)
    assert found.abs().amax(1).min() > 1e-3
    assert (mass(z - 0.1 * found) < mass(z) - 1e-5).all()
    assert gradient("reverse_kl_sg").abs().max() < 1e-16


def test_a_tail_that_published_code_clamps_has_a_gradient_here() -> None:
    """A student whose tail is below 1e-8: held at that, it cannot be raised to the teacher's 1e-3."""
    k = 3
    z_s, z_t = _rows(0.3)
    z_s[:, k:] = z_s[:, k:] / 10 - 30
    z_t[:, k:] = z_t[:, k:] / 10 - 8
    z_s[:, :k], z_t[:, :k] = z_s[:, :k] / 10, z_t[:, :k] / 10

    def clamped(s: Tensor, t: Tensor) -> Tensor:
        parts = [torch.cat((x[:, :k], x[:, k:].sum(1, keepdim=True).clamp(min=1e-8)), 1) for x in (s, t)]
        return _kl(parts[1], parts[0])

    s, t = z_s.softmax(1), z_t.softmax(1)
    assert s[:, k:].sum(1).max() < 1e-8
    _, published = _defined(z_s, z_t, clamped)
    objective = Objective("forward_kl", support=Support(k, "teacher", "tail"))
    found = _found(z_s, z_t, objective).gradients["z"]
    assert published[:, k:].abs().max() < 1e-8
    torch.testing.assert_close(found[:, k:].sum(1), (s - t)[:, k:].sum(1), rtol=1e-9, atol=0)
    assert (found[:, k:].sum(1) < -1e-3).all()

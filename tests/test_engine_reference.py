"""The reference backend is the truth of every other test, so it is held against formulas written anew here.

Those use `torch.distributions`, `F.kl_div` or plain loops over entries, all in fp64. The gradient is held
against finite differences. The `torch` backend must be the same function, so it takes the same tests.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from opsd_kernels import Logits, Objective, loss
from opsd_kernels.testing import Case, hidden_case, hidden_sources, logits_case, logits_of

BACKENDS = ("reference", "torch")
DIFFERENTIABLE = {
    "forward_kl": Objective("forward_kl"),
    "reverse_kl": Objective("reverse_kl"),
    "jsd": Objective("jsd"),
    "jsd at 0.1": Objective("jsd", beta=0.1),
    "jsd at 0.9": Objective("jsd", beta=0.9),
    "jsd at 0": Objective("jsd", beta=0.0),
    "jsd at 1": Objective("jsd", beta=1.0),
    "opsd": Objective("forward_kl", entry_clip=0.05),
    "clipped reverse_kl": Objective("reverse_kl", entry_clip=0.05),
    "clipped jsd": Objective("jsd", beta=0.3, entry_clip=0.02),
    "token clip": Objective("forward_kl", token_clip=0.2),
    "both clips": Objective("reverse_kl", entry_clip=0.1, token_clip=0.02),
}
# The loops write the JSD as it is; at its ends it stands for another divergence, which has its own test.
INSIDE = {name: x for name, x in DIFFERENTIABLE.items() if x.beta not in (0, 1)}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.4},
    "all three": {"bias": True, "softcap": 3.0, "logit_scale": 0.4},
}


def _tokens(
    case: Case, objective: Objective | str, backend: str = "reference", **options: Any
) -> torch.Tensor:
    return loss(
        case.student, case.teacher, objective=objective, reduction="none", backend=backend, **options
    ).detach()


def _pairs(case: Case, temperature: float = 1.0) -> tuple[Categorical, Categorical]:
    z_s, z_t = logits_of(case)
    return Categorical(logits=z_s / temperature), Categorical(logits=z_t / temperature)


def _loop(s: list[float], t: list[float], objective: Objective) -> float:
    """One token's loss, entry by entry, as the papers write it."""
    total = 0.0
    for p_s, p_t in zip(s, t, strict=True):
        mixed = objective.beta * p_t + (1 - objective.beta) * p_s
        forward, reverse = p_t * math.log(p_t / p_s), p_s * math.log(p_s / p_t)
        term = {
            "forward_kl": forward,
            "reverse_kl": reverse,
            "jsd": objective.beta * p_t * math.log(p_t / mixed)
            + (1 - objective.beta) * p_s * math.log(p_s / mixed),
        }[objective.divergence]
        total += term if objective.entry_clip is None else min(term, objective.entry_clip)
    return total if objective.token_clip is None else min(total, objective.token_clip)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_kl_divergences_are_those_of_torch_distributions(temperature: float, backend: str) -> None:
    case = logits_case(9, 23)
    student, teacher = _pairs(case, temperature)
    forward = _tokens(case, "forward_kl", backend, temperature=temperature)
    reverse = _tokens(case, "reverse_kl", backend, temperature=temperature)
    torch.testing.assert_close(forward, kl_divergence(teacher, student))
    torch.testing.assert_close(reverse, kl_divergence(student, teacher))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [1e-3, 0.1, 0.5, 0.9])
def test_jsd_is_the_generalised_one(beta: float, backend: str) -> None:
    case = logits_case(9, 23)
    student, teacher = _pairs(case)
    mixture = Categorical(probs=beta * teacher.probs + (1 - beta) * student.probs)
    expected = beta * kl_divergence(teacher, mixture) + (1 - beta) * kl_divergence(student, mixture)
    torch.testing.assert_close(_tokens(case, Objective("jsd", beta=beta), backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("beta", "name"), [(0, "forward_kl"), (1, "reverse_kl"), (0.0, "forward_kl")])
def test_jsd_at_its_ends_stands_for_a_kl_divergence(beta: float, name: str, backend: str) -> None:
    case = logits_case(9, 23)
    ends = _tokens(case, Objective("jsd", beta=beta, entry_clip=0.3), backend)
    assert torch.equal(ends, _tokens(case, Objective(name, entry_clip=0.3), backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_kl_is_the_docstrings_eager_code(backend: str) -> None:
    case = hidden_case((2, 4), 11, 6)
    mask = torch.arange(8).reshape(2, 4) % 3 != 0
    weight = torch.linspace(0.1, 2.0, 8, dtype=torch.float64).reshape(2, 4)
    student, teacher = hidden_sources(case)
    log_s = F.log_softmax(F.linear(student.hidden, student.weight) / 0.7, -1)
    log_t = F.log_softmax(F.linear(teacher.hidden, student.weight) / 0.7, -1)
    token = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
    expected = (token * weight)[mask].sum() / mask.sum()
    options: dict[str, Any] = {"mask": mask, "token_weight": weight, "temperature": 0.7, "backend": backend}
    actual = loss(student.hidden, teacher.hidden, student.weight, objective="forward_kl", **options)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["zero", "scale"])
@pytest.mark.parametrize("objective", INSIDE.values(), ids=INSIDE)
def test_values_are_those_of_plain_loops(objective: Objective, mode: str, backend: str) -> None:
    objective = replace(objective, clip_mode=mode)
    case = logits_case(6, 13, gap=1.0)
    student, teacher = _pairs(case)
    rows = zip(student.probs.tolist(), teacher.probs.tolist(), strict=True)
    expected = [_loop(s, t, objective) for s, t in rows]
    torch.testing.assert_close(_tokens(case, objective, backend), torch.tensor(expected).double())


def test_the_loops_see_clipped_and_unclipped_entries_and_tokens() -> None:
    case = logits_case(6, 13, gap=1.0)
    for name in ("opsd", "clipped reverse_kl", "clipped jsd", "token clip", "both clips"):
        objective = DIFFERENTIABLE[name]
        clipped = _tokens(case, objective)
        free = _tokens(case, replace(objective, entry_clip=None, token_clip=None))
        assert (clipped < free).any(), name
        if objective.token_clip is not None:
            assert (clipped == objective.token_clip).any(), name
            assert (clipped < objective.token_clip).any(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("objective", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_gradient_of_logits_is_that_of_finite_differences(
    objective: Objective, reduction: str, backend: str
) -> None:
    case = logits_case(4, 5, gap=1.0, peak=1.0)
    teacher = case.teacher

    def of(z: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"objective": objective, "reduction": reduction, "temperature": 0.8}
        return loss(Logits(z), teacher, backend=backend, **options)

    assert torch.autograd.gradcheck(of, (logits_of(case)[0].requires_grad_(),))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("name", ["reverse_kl", "opsd"])
def test_gradient_of_hidden_states_is_that_of_finite_differences(
    name: str, head: dict[str, Any], reduction: str, backend: str
) -> None:
    case = hidden_case(4, 5, 3, gap=1.0, peak=2.0, **head)
    student, teacher = hidden_sources(case)
    mask = torch.tensor([True, True, False, True])

    def of(*tensors: torch.Tensor) -> torch.Tensor:
        fields: dict[str, Any] = dict(zip(("hidden", "weight", "bias"), tensors, strict=False))
        options: dict[str, Any] = {
            "objective": name,
            "reduction": reduction,
            "mask": mask,
            "temperature": 0.8,
        }
        return loss(replace(student, **fields), teacher, workspace_bytes=100, backend=backend, **options)

    inputs = [x.clone().requires_grad_() for x in student.tensors if x is not None]
    assert torch.autograd.gradcheck(of, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_scaled_clip_multiplies_each_terms_pull_by_a_constant(divergence: str, backend: str) -> None:
    """d/dz sum_v c_v l_v with c_v = tau / l_v where l_v > tau, c_v and the token's factor held constant."""
    tau, bound = 0.05, 0.02
    case = logits_case(6, 13, gap=1.0)
    student, teacher = _pairs(case)
    z = student.logits.clone().requires_grad_()
    s, t = z.softmax(-1), teacher.probs
    m = (s + t) / 2
    terms = {
        "forward_kl": t * (t / s).log(),
        "reverse_kl": s * (s / t).log(),
        "jsd": (t * (t / m).log() + s * (s / m).log()) / 2,
    }[divergence]
    factor = (tau / terms).clamp(max=1).where(terms > 0, torch.ones(())).detach()
    token = (terms * factor).sum(-1)
    ratio = (bound / token).clamp(max=1).where(token > 0, torch.ones(())).detach()
    (token * ratio).sum().backward()

    leaf = student.logits.clone().requires_grad_()
    objective = Objective(divergence, entry_clip=tau, clip_mode="scale", token_clip=bound)
    loss(Logits(leaf), case.teacher, objective=objective, reduction="sum", backend=backend).backward()
    torch.testing.assert_close(leaf.grad, z.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_published_clip_pushes_the_wanted_token_down_and_a_scaled_one_up(backend: str) -> None:
    """The reason for the second mode, on a token that the teacher is sure of and the student is not."""
    teacher = Logits(torch.tensor([[4.0, 0.0, 0.0, 0.0]]).double())
    pull = {}
    for mode in ("zero", "scale"):
        z = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
        objective = Objective(entry_clip=0.05, clip_mode=mode)
        value = loss(Logits(z), teacher, objective=objective, backend=backend)
        (gradient,) = torch.autograd.grad(value, z)
        pull[mode] = -float(gradient[0, 0])
    assert pull["zero"] < 0 < pull["scale"]

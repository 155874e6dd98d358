"""The backend `"triton_paired"` from end to end, in Triton's interpreter."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from opsd_kernels import Hidden, Logits, LogLinear, Objective, Support, loss, loss_and_stats, token_stats
from opsd_kernels.testing import Case, evaluate, hidden_case, hidden_sources, relative_error

# What fp16 of z - (maximum of the tile) may cost of a gradient, for pairs that are a tenth of a nat apart or
# more. fp32 logits err by 1e-6, bf16 logits by 2e-2 to 6e-1.
FORMAT = 1.3e-3
OBJECTIVES = {
    "forward_kl": Objective("forward_kl"),
    "reverse_kl": Objective("reverse_kl"),
    "jsd": Objective("jsd", beta=0.3),
    "opsd": Objective("forward_kl", entry_clip=0.05),
    "scaled": Objective("forward_kl", entry_clip=0.05, clip_mode="scale", token_clip=0.5),
}


def case_of(**head: Any) -> Case:
    """Three tiles of columns, the last one ragged."""
    return hidden_case(6, 301, 16, gap=1.0, **head).to(torch.float32)


def errors(case: Case, backend: str = "triton_paired") -> dict[str, float]:
    """Relative errors of the value and of every gradient."""
    actual = evaluate(partial(loss, backend=backend), case, torch.ones(()))
    exact = evaluate(partial(loss, backend="reference"), case.to(torch.float64), torch.ones(()))
    found = {name: relative_error(actual.gradients[name], x) for name, x in exact.gradients.items()}
    return {"loss": relative_error(actual.loss, exact.loss), **found}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient(name: str) -> None:
    found = errors(case_of().having(objective=OBJECTIVES[name]))
    assert max(found.values()) < FORMAT, found


def test_bias_scale_soft_cap_temperature_weights_and_dead_rows() -> None:
    case = case_of(bias=True, softcap=12.0, logit_scale=0.7)
    mask = torch.tensor([True, False, True, True, True, True])
    weight = torch.tensor([1.0, 1.0, 0.0, 2.0, -1.0, 0.5])
    case = case.having(mask=mask, token_weight=weight, temperature=1.3, objective="reverse_kl")
    found = errors(case.having(workspace_bytes=2 * 2 * 301 * 2))  # two rows a chunk
    assert max(found.values()) < FORMAT, found


def test_far_better_than_two_byte_logits() -> None:
    """Of a close pair: 20 times and more."""
    case = hidden_case(6, 301, 16, gap=0.1).to(torch.float32).having(objective="forward_kl")
    student, teacher = hidden_sources(case)
    z_s, z_t = (x.hidden @ x.weight.T for x in (student, teacher))
    exact = torch.softmax(z_s.double(), -1) - torch.softmax(z_t.double(), -1)
    rounded = torch.softmax(z_s.bfloat16().float(), -1) - torch.softmax(z_t.bfloat16().float(), -1)
    ours = errors(case)["hidden"]
    head = student.weight.double()
    assert 20 * ours < relative_error(rounded.double() @ head, exact @ head)


def test_statistics() -> None:
    case, ids = case_of(bias=True), torch.tensor([0, 127, 128, 255, 256, 300])
    options: dict[str, Any] = {"token_ids": ids, "temperature": 0.8, "objective": "opsd"}
    exact = case.to(torch.float64)
    expected = token_stats(exact.student, exact.teacher, backend="reference", **options)
    actual = token_stats(case.student, case.teacher, backend="triton_paired", **options)
    for name, found, truth in zip(actual._fields, actual, expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=2e-3, atol=3e-3, msg=lambda m, f=name: f"{f}: {m}")
    value, stats = loss_and_stats(case.student, case.teacher, backend="triton_paired", **options)
    assert value == loss(case.student, case.teacher, backend="triton_paired", **options)
    assert all(torch.equal(a, b) for a, b in zip(stats, actual, strict=True))


def test_column_filter() -> None:
    """A tiny threshold leaves nothing out; a large one leaves out a part that is reported."""
    case = case_of().having(objective="forward_kl")
    whole = evaluate(partial(loss, backend="triton_paired"), case)
    kept = evaluate(partial(loss, backend="triton_paired", grad_filter=1e-30), case)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(kept.gradients[name], gradient, rtol=1e-5, atol=1e-7)
    student, _ = hidden_sources(case)
    trained = replace(student, hidden=student.hidden.detach().requires_grad_())
    _, stats = loss_and_stats(
        trained, case.teacher, backend="triton_paired", grad_filter=2.0**-6, **case.options
    )
    assert 0 < stats.dropped_share.max() < 0.5


def test_no_rows() -> None:
    student, teacher = hidden_sources(case_of())
    hidden = student.hidden.detach().requires_grad_()
    mask = torch.zeros(6, dtype=torch.bool)
    value = loss(replace(student, hidden=hidden), teacher, mask=mask, backend="triton_paired")
    value.backward()
    assert value == 0
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()


def refused() -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    student, teacher = hidden_sources(case_of())
    other = Hidden(teacher.hidden, teacher.weight.clone())
    z = Logits(torch.randn(6, 301))
    top = Objective("forward_kl", support=Support(4, "teacher"))
    return {
        "another head": (student, other, {}),
        "another scale": (student, replace(teacher, logit_scale=2.0), {}),
        "logits": (z, z, {}),
        "a combined teacher": (student, LogLinear([(0.5, teacher), (0.5, other)]), {}),
        "a support": (student, teacher, {"objective": top}),
        "a loss per token": (student, teacher, {"reduction": "none"}),
    }


@pytest.mark.parametrize("what", refused())
def test_what_it_does_not_serve_is_refused(what: str) -> None:
    student, teacher, options = refused()[what]
    with pytest.raises(ValueError, match=r"backend: expected 'triton'.*; got 'triton_paired'"):
        loss(student, teacher, backend="triton_paired", **options)

"""Views of every kind: transposed, expanded, with gaps and offsets. The result is that of plain tensors."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from opsd_kernels import Logits, loss
from opsd_kernels.testing import Outcome, evaluate, hidden_case, hidden_sources, logits_case, logits_of

View = Callable[[torch.Tensor], torch.Tensor]
REDUCTIONS = ("mean", "none")


def _gaps(x: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    wide[..., 1 : 2 * x.shape[-1] + 1 : 2] = x
    return wide[..., 1 : 2 * x.shape[-1] + 1 : 2]


def _rows_apart(x: torch.Tensor) -> torch.Tensor:
    tall = torch.full((2 * x.shape[0] + 1, *x.shape[1:]), torch.nan, dtype=x.dtype)
    tall[1::2] = x
    return tall[1::2]


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.mT.contiguous().mT


VIEWS: dict[str, View] = {"gaps": _gaps, "rows apart": _rows_apart, "transposed": _transposed}


def _close(a: Outcome, b: Outcome) -> None:
    """Equal but for the order in which another layout's GEMM adds up."""
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-7)
    for name, gradient in b.gradients.items():
        torch.testing.assert_close(a.gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_hidden_states_and_heads_in_views(view: View, reduction: str) -> None:
    case = hidden_case((6, 5), 37, 12).to(torch.float32).having(reduction=reduction)
    student, teacher = hidden_sources(case)
    expected = evaluate(loss, case)
    hidden = replace(student, hidden=view(student.hidden)), replace(teacher, hidden=view(teacher.hidden))
    assert not hidden[0].hidden.is_contiguous()
    _close(evaluate(loss, replace(case, student=hidden[0], teacher=hidden[1])), expected)
    head = view(student.weight)
    heads = replace(student, weight=head), replace(teacher, weight=head)
    _close(evaluate(loss, replace(case, student=heads[0], teacher=heads[1])), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_logits_in_views(view: View, reduction: str) -> None:
    case = logits_case((6, 5), 37).to(torch.float32).having(reduction=reduction)
    z_s, z_t = logits_of(case)
    viewed = replace(case, student=Logits(view(z_s)), teacher=Logits(view(z_t)))
    _close(evaluate(loss, viewed), evaluate(loss, case))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_expanded_rows(reduction: str) -> None:
    """One row seen many times: gradients of the copies, not of the row."""
    case = hidden_case((1, 5), 37, 12).to(torch.float32).having(reduction=reduction)
    student, teacher = hidden_sources(case)
    views = student.hidden.expand(4, 5, 12), teacher.hidden.expand(4, 5, 12)
    copies = [replace(x, hidden=v.contiguous()) for x, v in zip((student, teacher), views, strict=True)]
    expanded = [replace(x, hidden=v) for x, v in zip((student, teacher), views, strict=True)]
    outcome = evaluate(loss, replace(case, student=expanded[0], teacher=expanded[1]))
    _close(outcome, evaluate(loss, replace(case, student=copies[0], teacher=copies[1])))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_view_inside_a_larger_graph(reduction: str) -> None:
    """Completion positions cut out of a sequence, as a trainer does it, and the gradient of the whole."""
    sequence = torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher, weight = torch.randn(3, 4, 12), torch.randn(37, 12)
    tokens = loss(sequence[:, 5:], teacher, weight, reduction=reduction)
    tokens.sum().backward()
    part = sequence.detach()[:, 5:].clone().requires_grad_()
    loss(part, teacher, weight, reduction=reduction).sum().backward()
    assert sequence.grad is not None
    assert (sequence.grad[:, :5] == 0).all()
    torch.testing.assert_close(sequence.grad[:, 5:], part.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masks_weights_and_upstream_gradients_in_views(reduction: str) -> None:
    case = hidden_case((6, 5), 37, 12).to(torch.float32).having(reduction=reduction)
    mask = (torch.arange(5) % 2 == 0).expand(6, 5)
    weight = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)).T
    upstream = torch.tensor(0.7).expand((6, 5) if reduction == "none" else ())
    outcome = evaluate(loss, case.having(mask=mask, token_weight=weight), upstream)
    plain = case.having(mask=mask.contiguous(), token_weight=weight.contiguous())
    expected = evaluate(loss, plain, upstream.contiguous())
    assert torch.equal(outcome.loss, expected.loss)
    for name, gradient in expected.gradients.items():
        assert torch.equal(outcome.gradients[name], gradient)

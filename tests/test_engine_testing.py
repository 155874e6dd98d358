"""The rule itself: what it lets through, and what it must not."""

import pytest
import torch

from opsd_kernels.testing import assert_accurate, hidden_case, hidden_sources, one_minus_cosine, upstream_of

TRUTH = torch.randn(40, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
EAGER = TRUTH + 1e-6 * TRUTH.flip(0)


def _rule(actual: torch.Tensor, eager: torch.Tensor = EAGER) -> None:
    assert_accurate("dX", actual, TRUTH, eager)


def test_passes_what_is_as_good_as_eager() -> None:
    _rule(EAGER.float())
    _rule(TRUTH.float(), eager=TRUTH)


def test_rounding_to_a_short_dtype_is_allowed() -> None:
    _rule(TRUTH.bfloat16())
    _rule(TRUTH.half())


def _missing_row() -> torch.Tensor:
    actual = TRUTH.clone()
    actual[3] = 0
    return actual


@pytest.mark.parametrize(
    ("actual", "eager", "message"),
    [
        (TRUTH[:-1], EAGER, "shape"),
        (TRUTH.clone().index_fill_(0, torch.tensor([2]), torch.nan), EAGER, "not finite"),
        (-TRUTH, EAGER, "error"),
        (TRUTH.float() * (1 + 1e-6), TRUTH, "error"),
        (TRUTH + 3e-6 * TRUTH.abs().max(), EAGER, "error"),
        (TRUTH + 2.5e-6, TRUTH + 2e-6 * torch.eye(40, 30), "L2 error"),
        (TRUTH + 0.05 * TRUTH.flip(0), TRUTH + 0.1, "cosine"),
        (_missing_row(), TRUTH + 100.0, "cosine"),
    ],
    ids=["shape", "nan", "sign", "8 ulp", "max", "l2", "direction", "row in direction"],
)
def test_stops(actual: torch.Tensor, eager: torch.Tensor, message: str) -> None:
    """Case "l2" errs everywhere as much as eager does in few places."""
    with pytest.raises(AssertionError, match=message):
        _rule(actual, eager)


def test_a_lost_row_is_seen_even_where_it_hardly_turns_the_whole() -> None:
    truth = TRUTH.clone()
    truth[3] *= 2e-3
    actual = truth.clone()
    actual[3] = 0
    assert one_minus_cosine(actual, truth) < 1e-6
    with pytest.raises(AssertionError, match=r"0\.000 of its norm"):
        assert_accurate("dX", actual, truth, truth + 0.1)


def test_a_case_rounds_its_inputs_once_and_keeps_the_shared_head() -> None:
    case = hidden_case(3, 5, 4).to(torch.bfloat16)
    wide = case.to(torch.float64)
    student, teacher = hidden_sources(wide)
    for source in (student, teacher):
        assert source.hidden.dtype == torch.float64
        assert torch.equal(source.hidden.bfloat16().double(), source.hidden)
    assert student.weight is teacher.weight


def test_the_upstream_gradient_is_not_one() -> None:
    upstream = upstream_of(torch.zeros(200))
    assert (upstream < 0).any()
    assert (upstream > 0).any()
    assert float(upstream_of(torch.tensor(0.0))) not in (0.0, 1.0)

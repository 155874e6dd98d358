"""The project's tolerance rule, and what a break of it by chance is.

The rule's yardstick is eager PyTorch's largest error on the same case. On a small case that is now and then
small by luck, and a result breaks the rule by a factor of 2 or 3 without being wrong. Such a break is
`Unlucky`: the case is drawn anew at two more seeds and has to pass at both. What exceeds `GROSS` times
eager's error, or is not finite, is wrong at once.
"""

from collections.abc import Callable
from functools import partial

import torch

import opsd_kernels
from opsd_kernels.testing import (
    COSINE,
    Case,
    Outcome,
    assert_accurate,
    assert_case_accurate,
    eager_loss,
    evaluate,
    upstream_of,
)

GROSS = 5.0
# Logits of 2 bytes an entry are not fp32's equal: what they may cost of a gradient (L2) and of a value, where
# eager PyTorch with its bf16 logits does not cost more.
TWO_BYTES = "triton_paired"
GRADIENT_BOUND = 1e-2
VALUE_BOUND = 1e-3, 1e-4  # relative, absolute


class Unlucky(AssertionError):
    """The rule is broken by less than `GROSS`."""


def case_accurate(case: Case, backend: str, *, cosine: float = COSINE) -> Outcome:
    """`assert_case_accurate`, which raises `Unlucky` for a narrow break; bounds for logits of 2 bytes."""
    if backend == TWO_BYTES:
        return _two_bytes_accurate(case)
    try:
        return assert_case_accurate(case, backend=backend, cosine=cosine)
    except AssertionError as error:
        if _is_narrow(case, backend):
            raise Unlucky(str(error)) from error
        raise


def _two_bytes_accurate(case: Case) -> Outcome:
    actual = evaluate(partial(opsd_kernels.loss, backend=TWO_BYTES), case)
    upstream = upstream_of(actual.loss)
    truth = evaluate(partial(opsd_kernels.loss, backend="reference"), case.to(torch.float64), upstream)
    eager = evaluate(eager_loss, case, upstream)
    _two_bytes("loss", actual.loss, truth.loss, eager.loss)
    for name, exact in truth.gradients.items():
        _two_bytes(f"d{name}", actual.gradients[name], exact, eager.gradients[name])
    return actual


def _two_bytes(name: str, actual: torch.Tensor, expected: torch.Tensor, eager: torch.Tensor) -> None:
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    assert bool(torch.isfinite(actual).all()), f"{name}: not finite"
    off, usual = (float((x.double() - expected).norm()) for x in (actual, eager))
    size = float(expected.norm())
    bound = VALUE_BOUND[0] * size + VALUE_BOUND[1] if name == "loss" else GRADIENT_BOUND * size
    assert off <= max(bound, 2 * usual), f"{name}: error {off:.2e}, bound {bound:.2e}, eager's {usual:.2e}"


def accurate(
    name: str, actual: torch.Tensor, expected: torch.Tensor, eager: torch.Tensor, backend: str
) -> None:
    """`assert_accurate`, which raises `Unlucky` for a narrow break; bounds for logits of 2 bytes."""
    if backend == TWO_BYTES:
        _two_bytes(name, actual, expected, eager)
        return
    try:
        assert_accurate(name, actual, expected, eager)
    except AssertionError as error:
        if _narrow(actual, expected, eager):
            raise Unlucky(str(error)) from error
        raise


def over_seeds(run: Callable[[int], str]) -> str:
    """Runs a check at seed 0, and at two more if it was unlucky there."""
    try:
        return run(0)
    except Unlucky as first:
        for seed in (1, 2):
            numbers = run(seed)
        return f"{numbers}; narrowly off at seed 0, right at seeds 1 and 2: {first}"


def _is_narrow(case: Case, backend: str) -> bool:
    actual = evaluate(partial(opsd_kernels.loss, backend=backend), case)
    upstream = upstream_of(actual.loss)
    truth = evaluate(partial(opsd_kernels.loss, backend="reference"), case.to(torch.float64), upstream)
    eager = evaluate(eager_loss, case, upstream)
    tokens = case.having(reduction="none", denominator=None)
    exact = opsd_kernels.loss(*_sources(tokens.to(torch.float64)), backend="reference", **tokens.options)
    errors = (eager_loss(tokens.student, tokens.teacher, **tokens.options) - exact).abs()
    # A mean's error is at most that of its largest token.
    yardstick = eager.loss if actual.loss.dim() else truth.loss + errors.max()
    pairs = [(actual.loss, truth.loss, yardstick)]
    pairs += [(actual.gradients[k], truth.gradients[k], eager.gradients[k]) for k in truth.gradients]
    return all(_narrow(*pair) for pair in pairs)


def _sources(case: Case) -> tuple[opsd_kernels.sources.Source, opsd_kernels.sources.Source]:
    return case.student, case.teacher


def _narrow(actual: torch.Tensor, expected: torch.Tensor, eager: torch.Tensor) -> bool:
    if actual.shape != expected.shape or not bool(torch.isfinite(actual).all()):
        return False
    bound = (eager.double() - expected).abs().max() + torch.finfo(actual.dtype).eps * expected.abs().max()
    return bool((actual.double() - expected).abs().max() <= GROSS * bound)

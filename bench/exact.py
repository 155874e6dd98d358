"""Is it the same loss, and how exact are its gradients? Against the reference in fp64."""

from dataclasses import dataclass, replace
from functools import cache

import torch

from bench.cases import Case, Inputs
from bench.contenders import Contender
from opsd_kernels import loss

ACCURACY_ROWS = 256  # fp64 logits of more rows of a large vocabulary do not fit a GPU
SLAB = 4096  # rows of dW that are compared at once, for the same reason
# The semantics problem tells other functions (direction, T^2, sum instead of mean, mask) apart by far more
# than this; rounding of logits to 16 bits stays far below.
VALUE_TOLERANCE = 0.02
GRADIENT_TOLERANCE = 0.15


@dataclass(frozen=True)
class Errors:
    """Errors against fp64: relative, of the value; relative L2 and 1 - cosine, of the gradients."""

    value: float
    dh: float
    dh_cosine: float
    dw: float | None = None
    dw_cosine: float | None = None

    @property
    def other_loss(self) -> str | None:
        """What shows that another function was computed, or None. NaN shows it too."""
        if not self.value <= VALUE_TOLERANCE:
            return f"another loss: value off by {self.value:.1%}"
        if not max(self.dh, self.dw or 0) <= GRADIENT_TOLERANCE:
            return f"another gradient: dH off by {self.dh:.0%}, dW by {self.dw or 0:.0%}"
        return None


class Exact:
    """Value and gradients of the fp64 reference for some inputs, and what others miss them by."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        student = inputs.student.detach().double().requires_grad_()
        head = inputs.head.detach().double().requires_grad_(inputs.head.requires_grad)
        value = loss(
            student,
            inputs.teacher.double(),
            head,
            objective=case.loss_objective,
            mask=inputs.mask,
            temperature=case.temperature,
            backend="reference",
        )
        value.backward()
        self.value, self.dh, self.dw = float(value.detach()), student.grad, head.grad

    def errors(self, value: torch.Tensor, inputs: Inputs) -> Errors:
        """Errors of a value and of the gradients that a contender left in the inputs' leaves."""
        assert self.dh is not None
        dh, dh_cosine = compare(inputs.student.grad, self.dh)
        dw, dw_cosine = (None, None) if self.dw is None else compare(inputs.head.grad, self.dw)
        relative = abs(float(value) - self.value) / abs(self.value)
        return Errors(relative, dh, dh_cosine, dw, dw_cosine)


def compare(actual: torch.Tensor | None, exact: torch.Tensor) -> tuple[float, float]:
    """Relative L2 error, and 1 - cosine by a form that does not cancel; NaN without a gradient."""
    if actual is None:
        return float("nan"), float("nan")
    error, angle = 0.0, 0.0
    exact_norm, actual_norm = float(exact.norm()), _norm(actual)
    for start in range(0, len(exact), SLAB):
        a, e = actual[start : start + SLAB].double(), exact[start : start + SLAB]
        error += float((a - e).square().sum())
        angle += float((a / actual_norm - e / exact_norm).square().sum())
    return error**0.5 / exact_norm, angle / 2


def _norm(tensor: torch.Tensor) -> float:
    squares = [float(part.double().square().sum()) for part in tensor.split(SLAB)]
    return sum(squares) ** 0.5


def semantics(contender: Contender, case: Case) -> Errors:
    """Errors of a contender on a small problem of the case's objective and options.

    In fp32, where an error is no rounding, or in the case's dtype if the contender refuses fp32. The student
    is flatter than the teacher, so that the two directions of KL differ by far.

    Raises:
        Exception: whatever the contender raises in the case's own dtype.
    """
    masked = 0.5 if case.masked else 0.0
    small = replace(case, rows=48, vocab=512, hidden=64, gap=1.0, masked=masked, recorded=None)
    return _semantics(contender, small)


@cache
def _semantics(contender: Contender, small: Case) -> Errors:
    for dtype in dict.fromkeys(("float32", small.dtype)):
        problem = replace(small, dtype=dtype)
        inputs = Inputs.of(problem)
        with torch.no_grad():
            inputs.student.mul_(0.7)
        try:
            value = contender.function(inputs, problem)
        except (ValueError, TypeError):
            if dtype == small.dtype:
                raise
            continue
        return Exact(problem, inputs).errors(value, inputs)
    raise AssertionError("the case's own dtype either returns or raises")


def describe_data(case: Case, inputs: Inputs, rows: int = 64) -> dict[str, float]:
    """What the data is like, measured: entropies in nats and the standard deviation of the logit gap."""
    with torch.no_grad():
        head = inputs.head.float()
        z_s, z_t = (x[:rows].float() @ head.T for x in (inputs.student, inputs.teacher))
        teacher, student = (torch.distributions.Categorical(logits=z).entropy().mean() for z in (z_t, z_s))
        return {
            "student_entropy": float(student),
            "teacher_entropy": float(teacher),
            "logit_std": float(z_t.std()),
            "gap": float((z_s - z_t).std()),
        }

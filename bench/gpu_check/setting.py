"""What every stage shares: the device, the time left, the backends that are here, cases on the device."""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch

import opsd_kernels
from opsd_kernels.testing import Case, hidden_case, tensors_of

BACKENDS = ("torch", "triton", "triton_paired")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Skip(Exception):
    """Raised by a check that cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Where and how long.

    Args:
        device: `"cuda"`, or `"cpu"` for small sizes with Triton's interpreter.
        out: folder of the report.
        deadline: `time.monotonic()` at which the stage's time is spent.
        self_test: whether every backend carries planted faults.
    """

    device: str
    out: Path
    deadline: float
    self_test: bool = False

    @property
    def small(self) -> bool:
        """Whether sizes are for a CPU."""
        return self.device == "cpu"

    @property
    def left(self) -> float:
        """Seconds left to the stage."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Check:
    """One line of the report to be.

    Args:
        what: its name.
        run: returns the numbers; raises AssertionError if they are wrong, `Skip` if it cannot run here.
        group: checks of one group run in one process, in order; others may run beside it.
        limit: seconds after which it counts as hung, which is a failure.
        spoils: whether a failure leaves the process in a state that the next check must not inherit.
    """

    what: str
    run: Callable[[], str]
    group: str = ""
    limit: float = 120.0
    spoils: bool = False


def fused(backend: str) -> Callable[..., torch.Tensor]:
    """`opsd_kernels.loss` of a backend."""
    return partial(opsd_kernels.loss, backend=backend)


def accepts(argument: str) -> bool:
    """Whether `opsd_kernels.loss` has the argument."""
    return argument in inspect.signature(opsd_kernels.api.loss).parameters


def need(argument: str) -> None:
    """Skips the check if `opsd_kernels.loss` lacks the argument."""
    if not accepts(argument):
        raise Skip(f"loss has no argument {argument}=")


def is_refusal(error: Exception) -> bool:
    """Whether the engine says that a backend is missing or cannot run a case, rather than failing."""
    return isinstance(error, ValueError) and str(error).startswith("backend:")


@cache
def refusal(backend: str, device: str) -> str | None:
    """Why a backend cannot run here, in its own words; None if it runs in any dtype."""
    reason = None
    for dtype in DTYPES:
        case = on(hidden_case(2, 8, 8), device).to(dtype)
        try:
            fused(backend)(case.student, case.teacher)
        except Exception as error:
            if not is_refusal(error):
                return None  # it is here and fails: the checks will say how
            reason = str(error)
        else:
            return None
    return reason


def per_backend(setting: Setting, build: Callable[[str], list[Check]]) -> list[Check]:
    """The checks of every backend that runs here, and a line for each that does not."""
    checks = []
    for backend in BACKENDS:
        reason = refusal(backend, setting.device)
        checks += build(backend) if reason is None else [Check(backend, partial(_skip, reason))]
    return checks


def on(case: Case, device: str) -> Case:
    """The case, options included, on a device; a head that both sides share stays one tensor."""
    once: dict[int, torch.Tensor] = {}
    moved = []
    for source in (case.student, case.teacher):
        tensors = {k: once.setdefault(id(x), x.to(device)) for k, x in tensors_of(source).items()}
        moved.append(replace(source, **tensors))  # type: ignore[arg-type]
    options = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in case.options.items()}
    return Case(moved[0], moved[1], options)


def short(dtype: torch.dtype) -> str:
    """`bf16` for `torch.bfloat16`."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _skip(reason: str) -> str:
    raise Skip(reason)

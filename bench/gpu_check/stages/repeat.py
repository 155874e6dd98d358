"""The same bits every time, also while another stream keeps the device busy."""

from functools import partial

import torch

from bench.gpu_check.setting import Check, Setting, fused, on, per_backend
from opsd_kernels.testing import Case, Outcome, evaluate, hidden_case

REPEATS = 200
SMALL_REPEATS = 3


def checks(setting: Setting) -> list[Check]:
    """Both designs, with and without company."""
    times = SMALL_REPEATS if setting.small else REPEATS

    def build(backend: str) -> list[Check]:
        found = []
        for reduction in ("mean", "none"):
            what = f"{backend}, {reduction}, {times} repeats"
            case = partial(_case, setting, reduction)
            found.append(Check(what, partial(_repeat, backend, case, times, busy=False), group=backend))
            if not setting.small:
                run = partial(_repeat, backend, case, times, busy=True)
                found.append(Check(f"{what} beside a busy stream", run, group=backend))
        return found

    return per_backend(setting, build)


def _case(setting: Setting, reduction: str) -> Case:
    shape = (4, 97, 16) if setting.small else (600, 32_003, 256)
    return (
        on(hidden_case(*shape), setting.device)
        .to(torch.bfloat16)
        .having(objective="jsd", reduction=reduction)
    )


def _repeat(backend: str, build: partial[Case], times: int, busy: bool) -> str:
    case = build()
    first = evaluate(fused(backend), case)
    load = _Load() if busy else None
    for number in range(1, times + 1):
        if load is not None:
            load.add()
        again = evaluate(fused(backend), case)
        for name in _different(first, again):
            raise AssertionError(f"repeat {number} of {times}: other bits in {name}")
    return f"{times} times the bits of loss, {', '.join(f'd{name}' for name in first.gradients)}"


def _different(first: Outcome, again: Outcome) -> list[str]:
    names = [] if torch.equal(first.loss, again.loss) else ["loss"]
    return names + [
        f"d{name}" for name, x in first.gradients.items() if not torch.equal(x, again.gradients[name])
    ]


class _Load:
    """Matrix products on a stream of their own."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.a)
        self.stream.wait_stream(torch.cuda.current_stream())

    def add(self) -> None:
        """Some more, about as long as a repeat takes."""
        with torch.cuda.stream(self.stream):
            for _ in range(8):
                torch.mm(self.a, self.a, out=self.out)

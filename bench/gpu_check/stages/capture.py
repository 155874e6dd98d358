"""CUDA graphs of loss and backward: every replay has the bits of an eager call on the same inputs."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.gpu_check.setting import Check, Setting, fused, need, per_backend

REPLAYS = 20
ROWS, VOCAB, WIDTH = 256, 8_003, 128


def checks(setting: Setting) -> list[Check]:
    """All rows, some rows by `rows=`, and no row."""

    def build(backend: str) -> list[Check]:
        return [
            Check(
                f"{backend}, {reduction}, {kind}",
                partial(_capture, backend, kind, reduction),
                spoils=True,
            )
            for reduction in ("mean", "none")
            for kind in ("all rows", "rows=", "rows= of none", "all-dead mask, eager")
        ]

    return per_backend(setting, build)


@dataclass
class _Inputs:
    """Static memory: leaves `student`, `head`, and the constant `teacher`."""

    student: torch.Tensor
    teacher: torch.Tensor
    head: torch.Tensor

    @classmethod
    def empty(cls) -> "_Inputs":
        new = partial(torch.zeros, device="cuda", dtype=torch.bfloat16)
        return cls(new(ROWS, WIDTH).requires_grad_(), new(ROWS, WIDTH), new(VOCAB, WIDTH).requires_grad_())

    @torch.no_grad()
    def fill(self, seed: int) -> None:
        """New numbers in the same memory."""
        generator = torch.Generator("cuda").manual_seed(seed)
        draw = partial(torch.randn, generator=generator, device="cuda")
        self.student.copy_(draw(ROWS, WIDTH))
        self.teacher.copy_(self.student.float() + draw(ROWS, WIDTH) * 0.1)
        self.head.copy_(draw(VOCAB, WIDTH) * (4 / WIDTH**0.5))

    def step(self, backend: str, options: dict[str, Any]) -> torch.Tensor:
        """Loss and backward into fresh gradients."""
        self.student.grad = self.head.grad = None
        value = fused(backend)(self.student, self.teacher, self.head, objective="jsd", **options)
        value.sum().backward()
        return value.detach()

    def results(self, value: torch.Tensor) -> list[torch.Tensor]:
        """Copies of value, dH and dW."""
        assert self.student.grad is not None
        assert self.head.grad is not None
        return [x.clone() for x in (value, self.student.grad, self.head.grad)]


def _options(kind: str, reduction: str) -> dict[str, Any]:
    options: dict[str, Any] = {"reduction": reduction}
    if kind.startswith("rows="):
        need("rows")
        step, start = (ROWS, ROWS) if kind.endswith("none") else (3, 1)
        options["rows"] = torch.arange(start, ROWS, step, device="cuda")
    if kind.startswith("all-dead"):
        options["mask"] = torch.zeros(ROWS, dtype=torch.bool, device="cuda")
    return options


def _capture(backend: str, kind: str, reduction: str) -> str:
    options, static, eager = _options(kind, reduction), _Inputs.empty(), _Inputs.empty()
    if "mask" in options:  # finding its rows waits for the device, which a capture cannot
        static.fill(0)
        _assert_zero(static.results(static.step(backend, options)))
        return "exactly 0, and zero gradients"
    static.fill(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            static.step(backend, options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    static.student.grad = static.head.grad = None
    with torch.cuda.graph(graph):
        value = static.step(backend, options)
    for replay in range(1, REPLAYS + 1):
        static.fill(replay)
        eager.fill(replay)
        graph.replay()
        found = static.results(value)
        expected = eager.results(eager.step(backend, options))
        for name, actual, exact in zip(("loss", "dH", "dW"), found, expected, strict=True):
            assert torch.equal(actual, exact), f"replay {replay}: other bits in {name}"
        if kind.endswith("none"):
            _assert_zero(found)
    return f"{REPLAYS} replays with new inputs, bits of loss, dH, dW as eager"


def _assert_zero(results: list[torch.Tensor]) -> None:
    for name, x in zip(("loss", "dH", "dW"), results, strict=True):
        assert (x == 0).all(), f"{name} is not 0"

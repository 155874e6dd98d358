"""No call waits for the device: PyTorch raises at every synchronising call it knows of."""

from functools import partial
from typing import Any

import torch

from bench.gpu_check.setting import Check, Setting, accepts, fused, need, on, per_backend
from opsd_kernels.testing import hidden_case, hidden_sources, with_gradient


def checks(setting: Setting) -> list[Check]:
    """The default path, and some of the rows by `rows=`."""

    def build(backend: str) -> list[Check]:
        return [
            Check(f"{backend}, {reduction}, {kind}", partial(_run, backend, kind, reduction))
            for reduction in ("mean", "none")
            for kind in ("all rows", "rows=", "rows= and token weights")
        ]

    return per_backend(setting, build)


def _run(backend: str, kind: str, reduction: str) -> str:
    case = on(hidden_case(64, 4_001, 64), "cuda").to(torch.bfloat16)
    options: dict[str, Any] = {"objective": "opsd", "reduction": reduction}
    if kind.startswith("rows="):
        need("rows")
        options["rows"] = torch.arange(1, 64, 3, device="cuda")
    if kind.endswith("weights"):
        options["token_weight"] = torch.linspace(0, 2, 64, device="cuda")
    student, leaves = with_gradient(hidden_sources(case)[0])

    def step() -> None:
        value = fused(backend)(student, case.teacher, **options)
        value.backward(torch.ones_like(value))

    step()  # compiles kernels and allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(leaf.grad is not None for leaf in leaves.values())
    return "no host sync in loss and backward" + ("" if accepts("rows") else " (loss has no rows=)")

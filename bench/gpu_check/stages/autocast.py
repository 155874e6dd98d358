"""Under bf16 autocast the loss is as accurate as plain PyTorch with an `nn.Linear` head."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.gpu_check.rule import accurate, over_seeds
from bench.gpu_check.setting import Check, Setting, fused, on, per_backend
from opsd_kernels import Logits
from opsd_kernels.testing import Outcome, eager_loss, hidden_case, hidden_sources

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def checks(setting: Setting) -> list[Check]:
    """fp32 parameters with hidden states in fp32 and, as a backbone under autocast gives them, in bf16."""

    def build(backend: str) -> list[Check]:
        return [
            Check(
                f"{backend}, {reduction}, {hidden} hidden states",
                partial(over_seeds, partial(_run, setting, backend, reduction, hidden)),
            )
            for reduction in ("mean", "none")
            for hidden in DTYPES
        ]

    return per_backend(setting, build)


def _run(setting: Setting, backend: str, reduction: str, hidden: str, seed: int) -> str:
    shape = (5, 97, 16) if setting.small else (64, 2_003, 64)
    case = on(hidden_case(*shape, seed=seed), setting.device).to(DTYPES[hidden], head=torch.float32)
    student, teacher = hidden_sources(case)
    inputs = [student.hidden, teacher.hidden, student.weight]
    options: dict[str, Any] = {"objective": "jsd", "reduction": reduction}

    def ours(backend: str, leaf: torch.Tensor, constant: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return fused(backend)(leaf, constant, head, **options)

    def linear(leaf: torch.Tensor, constant: torch.Tensor, head: torch.Tensor, **o: Any) -> torch.Tensor:
        layer = torch.nn.functional.linear  # what nn.Linear calls
        return eager_loss(Logits(layer(leaf, head)), Logits(layer(constant, head).detach()), **(o or options))

    exact = _outcome(partial(ours, "reference"), [x.double() for x in inputs])
    with torch.autocast(setting.device, dtype=torch.bfloat16):
        found, eager = _outcome(partial(ours, backend), inputs), _outcome(linear, inputs)
    errors = []
    for name, expected in exact.gradients.items():
        accurate(name, found.gradients[name], expected, eager.gradients[name], backend)
        errors.append(f"{name} {_error(found.gradients[name], expected):.1e}")
    tokens = {**options, "reduction": "none"}
    with torch.no_grad():
        exact_tokens = fused("reference")(*(x.double() for x in inputs), **tokens)
        with torch.autocast(setting.device, dtype=torch.bfloat16):
            errors_of_tokens = (linear(*inputs, **tokens) - exact_tokens).abs()
    # The errors of eager's tokens may cancel in its mean, which is luck and no yardstick.
    yardstick = eager.loss if reduction == "none" else exact.loss + errors_of_tokens.mean()
    accurate("loss", found.loss, exact.loss, yardstick, backend)
    off, theirs = _error(found.loss, exact.loss), float(errors_of_tokens.mean() / exact_tokens.mean())
    return f"relative error: loss {off:.1e} (nn.Linear {theirs:.1e}), {', '.join(errors)}"


def _outcome(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Outcome:
    leaf, constant, head = inputs[0].detach().requires_grad_(), inputs[1], inputs[2].detach().requires_grad_()
    value = function(leaf, constant, head)
    value.backward(torch.ones_like(value))
    assert leaf.grad is not None
    assert head.grad is not None
    return Outcome(value.detach(), {"dH": leaf.grad, "dW": head.grad})


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())

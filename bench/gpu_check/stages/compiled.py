"""`torch.compile(fullgraph=True, dynamic=True)` of a function around the loss."""

from collections.abc import Callable
from functools import partial

import torch
from torch._dynamo.utils import counters

from bench.gpu_check.rule import accurate, over_seeds
from bench.gpu_check.setting import Check, Setting, fused, on, per_backend
from opsd_kernels import Hidden, loss
from opsd_kernels.testing import eager_loss, hidden_case, hidden_sources

SIZES = (16, 40, 72, 136)
MOST_GRAPHS = 3  # the first size, a second graph once it varies, and one to spare
Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def checks(setting: Setting) -> list[Check]:
    """Value and gradients over four sizes, for both designs."""

    def build(backend: str) -> list[Check]:
        return [
            Check(f"{backend}, {reduction}", partial(over_seeds, partial(_run, setting, backend, reduction)))
            for reduction in ("mean", "none")
        ]

    return per_backend(setting, build)


def _run(setting: Setting, backend: str, reduction: str, seed: int) -> str:
    def around(call: Callable[..., torch.Tensor]) -> Function:
        def function(student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
            value = call(torch.tanh(student), teacher, head, objective="jsd", reduction=reduction)
            return (value * 2).sum()

        return function

    torch._dynamo.reset()
    counters.clear()
    compiler = "aot_eager" if setting.small else "inductor"
    plain, truth = around(fused(backend)), around(partial(loss, backend="reference"))
    compiled = torch.compile(plain, fullgraph=True, dynamic=True, backend=compiler)
    sizes = SIZES[:2] if setting.small and backend != "torch" else SIZES
    equal = True
    for rows in sizes:
        case = on(hidden_case(rows, 97 if setting.small else 2_003, 32, seed=seed), setting.device)
        inputs = [*(x.hidden for x in hidden_sources(case)), hidden_sources(case)[0].weight]
        rounded = [x.float() for x in inputs]
        exact = _outcome(truth, [x.double() for x in rounded])
        found, uncompiled = _outcome(compiled, rounded), _outcome(plain, rounded)
        eager = _outcome(around(_eager), rounded)
        for name, actual, expected, usual in zip(("loss", "dH", "dW"), found, exact, eager, strict=True):
            if name != "loss":  # errors of tokens cancel in eager's sum: no yardstick
                accurate(name, actual, expected, usual, backend)
        torch.testing.assert_close(found[0], uncompiled[0], rtol=1e-5, atol=1e-6)
        equal &= all(torch.equal(a, b) for a, b in zip(found, uncompiled, strict=True))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= MOST_GRAPHS, f"{graphs} graphs for {len(sizes)} sizes"
    bits = "the bits" if equal else "the accuracy"
    return f"{compiler}, full graph, {graphs} graphs for N = {sizes}, {bits} of the uncompiled function"


def _eager(
    student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, *, objective: str, reduction: str
) -> torch.Tensor:
    return eager_loss(
        Hidden(student, head), Hidden(teacher, head.detach()), objective=objective, reduction=reduction
    )


def _outcome(function: Function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    student, teacher, head = inputs
    student, head = student.detach().requires_grad_(), head.detach().requires_grad_()
    value = function(student, teacher, head)
    value.backward()
    assert student.grad is not None
    assert head.grad is not None
    return [value.detach(), student.grad, head.grad]

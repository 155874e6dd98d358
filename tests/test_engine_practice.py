"""What training does to the engine: fp16 operands, long batches, teachers computed in inference mode."""

from dataclasses import replace

import pytest
import torch

from opsd_kernels import Hidden, loss
from opsd_kernels.engine.projection import Projection
from opsd_kernels.testing import evaluate, hidden_case, relative_error


def test_a_large_denominator_does_not_underflow_fp16_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the gradient of the logits is rounded to an fp16 head's dtype before its GEMMs.

    With the 1 / N of a long batch inside, most of its entries would be subnormal or 0.
    """
    case = hidden_case(64, 2000, 32).to(torch.float32).having(objective="forward_kl", denominator=131_072)
    one = torch.ones(())
    exact = evaluate(loss, case, one)
    monkeypatch.setattr(Projection, "operand_dtype", torch.float16)
    rounded = evaluate(loss, case, one)
    for name, gradient in exact.gradients.items():
        if gradient is not None:
            found = rounded.gradients[name]
            assert found is not None
            assert relative_error(found, gradient) < 1e-3


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_of_inference_mode(backend: str, reduction: str) -> None:
    case = hidden_case(4, 30, 8).to(torch.float32).having(reduction=reduction, backend=backend)
    assert isinstance(case.teacher, Hidden)
    with torch.inference_mode():
        teacher = replace(case.teacher, hidden=case.teacher.hidden.clone())
    expected = evaluate(loss, case)
    actual = evaluate(loss, replace(case, teacher=teacher))
    for name, gradient in expected.gradients.items():
        found = actual.gradients[name]
        assert found is not None or gradient is None
        if found is not None:
            assert torch.equal(found, gradient)  # type: ignore[arg-type]

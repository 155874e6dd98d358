"""Sizes and strides beyond 2^31: late rows equal the same rows computed alone."""

from dataclasses import replace
from functools import partial

import torch

from bench.gpu_check.rule import accurate
from bench.gpu_check.setting import Check, Setting, Skip, fused, per_backend
from opsd_kernels import Hidden, loss
from opsd_kernels.testing import Case, eager_loss, evaluate, relative_error, with_gradient

ROWS, VOCAB, WIDTH = 16_384, 151_936, 64
LATE = 64
STRIDE = 2**30  # of rows: the third one starts at element 2^31


def checks(setting: Setting) -> list[Check]:
    """N V beyond 2^31 in one chunk, in both designs, and rows 2^30 apart."""

    def build(backend: str) -> list[Check]:
        found = [
            Check(f"{backend}, N V = {ROWS * VOCAB / 2**31:.2f} x 2^31, {reduction}", partial(run, backend))
            for reduction, run in (("sum", _late_sum), ("none", _late_tokens))
        ]
        return [*found, Check(f"{backend}, hidden states 2^30 elements apart", partial(_far_rows, backend))]

    return per_backend(setting, build)


def _need(gib: float) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        raise Skip(f"needs {gib:.0f} GiB of device memory, {free:.0f} are free")


def _case() -> Case:
    """bf16 hidden states made on the device; one chunk holds all rows."""
    generator = torch.Generator("cuda").manual_seed(0)
    normal = partial(torch.randn, generator=generator, device="cuda")
    weight = (normal(VOCAB, WIDTH) * (4 / WIDTH**0.5)).bfloat16()
    hidden = normal(ROWS, WIDTH)
    teacher = (hidden + normal(ROWS, WIDTH) * 0.125).bfloat16()
    student = Hidden(hidden.bfloat16(), weight)
    return Case(student, replace(student, hidden=teacher), {"objective": "jsd"})


def _late(case: Case) -> Case:
    student, teacher = case.student, case.teacher
    assert isinstance(student, Hidden)
    assert isinstance(teacher, Hidden)
    late = [replace(x, hidden=x.hidden[-LATE:].contiguous()) for x in (student, teacher)]
    return Case(late[0], late[1], case.options)


def _late_sum(backend: str) -> str:
    """Design A: each row of dH depends on that row alone."""
    _need(34)
    case = _case().having(reduction="sum", workspace_bytes=2 * 4 * ROWS * VOCAB)
    student, leaves = with_gradient(case.student)
    fused(backend)(student, case.teacher, **case.options).backward()
    found = leaves["hidden"].grad
    assert found is not None
    return _compare({"dhidden": found[-LATE:]}, case, torch.ones((), device="cuda"), backend)


def _late_tokens(backend: str) -> str:
    """Design B, with an upstream gradient at the late rows alone, so that dW is theirs too."""
    _need(34)
    case = _case().having(reduction="none", workspace_bytes=2 * 4 * ROWS * VOCAB)
    student, leaves = with_gradient(case.student)
    tokens = fused(backend)(student, case.teacher, **case.options)
    upstream = torch.zeros_like(tokens)
    upstream[-LATE:] = torch.linspace(-1, 2, LATE, device="cuda")
    tokens.backward(upstream)
    results = {"loss": tokens.detach()[-LATE:]}
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        results[f"d{name}"] = leaf.grad[-LATE:] if name == "hidden" else leaf.grad
    return _compare(results, case, upstream[-LATE:], backend)


def _compare(found: dict[str, torch.Tensor], case: Case, upstream: torch.Tensor, backend: str) -> str:
    """The rule on the late rows; alone they are a small case, and a reference in fp64 fits."""
    alone = _late(case).having(workspace_bytes=None)
    truth = evaluate(partial(loss, backend="reference"), alone.to(torch.float64), upstream)
    eager = evaluate(eager_loss, alone, upstream)
    errors = []
    for name, actual in found.items():
        expected = truth.loss if name == "loss" else truth.gradients[name[1:]]
        usual = eager.loss if name == "loss" else eager.gradients[name[1:]]
        accurate(name, actual, expected, usual, backend)
        errors.append(f"{name} {float((actual.double() - expected).norm() / expected.norm()):.1e}")
    peak = torch.cuda.max_memory_allocated() / 2**30
    return f"relative error of the last {LATE} rows: {', '.join(errors)}; peak {peak:.0f} GiB"


def _far_rows(backend: str) -> str:
    """As contiguous rows; a product may run in another kernel there, so the last bits may differ."""
    _need(12)
    case = _case()
    student, teacher = case.student, case.teacher
    assert isinstance(student, Hidden)
    assert isinstance(teacher, Hidden)
    memory = torch.empty(2 * STRIDE + WIDTH, dtype=torch.bfloat16, device="cuda")
    far = memory.as_strided((3, WIDTH), (STRIDE, 1))
    far.copy_(student.hidden[:3])
    close = Case(replace(student, hidden=student.hidden[:3]), replace(teacher, hidden=teacher.hidden[:3]))
    errors = []
    for reduction in ("mean", "none"):
        contiguous = close.having(objective="jsd", reduction=reduction)
        apart = replace(contiguous, student=replace(student, hidden=far))
        upstream = torch.ones(3 if reduction == "none" else (), device="cuda")
        expected = evaluate(fused(backend), contiguous, upstream)
        # The hidden states are no leaf here: their gradient would have their strides, and 4 GiB.
        head = student.weight.detach().requires_grad_()
        value = fused(backend)(Hidden(far, head), apart.teacher, **apart.options)
        value.backward(upstream)
        torch.testing.assert_close(value.detach(), expected.loss, rtol=1e-5, atol=1e-6)
        assert head.grad is not None
        errors.append(relative_error(head.grad, expected.gradients["weight"]))
    assert max(errors) <= 2**-8, f"dweight: relative difference {max(errors):.1e}"
    return (
        f"rows 2^{STRIDE.bit_length() - 1} apart; dweight differs by {max(errors):.1e} from contiguous rows'"
    )

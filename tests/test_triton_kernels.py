"""The Triton row kernels in Triton's interpreter: no GPU, the same source, against the fp64 reference.

`conftest.py` switches the interpreter on. Blocks are made small so that a row has several of them, a ragged
last one, and parts (`SPLITS`) without any column.
"""

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_kernels import Hidden, Logits, Objective, loss, named_objectives, token_stats
from opsd_kernels.backends.triton import tiles
from opsd_kernels.testing import Case, assert_case_accurate, evaluate, hidden_case, logits_case

OBJECTIVES = {
    **named_objectives(),
    "forward_kl scaled clip": Objective("forward_kl", entry_clip=0.05, clip_mode="scale"),
    "reverse_kl clip": Objective("reverse_kl", entry_clip=0.03),
    "jsd 0.2 scaled clip": Objective("jsd", beta=0.2, entry_clip=0.01, clip_mode="scale"),
    "token clip": Objective("reverse_kl", token_clip=0.1),
    "token and entry clip, scaled": Objective("jsd", entry_clip=0.02, token_clip=0.1, clip_mode="scale"),
}


def assert_within_rounding(case: Case) -> None:
    """Value and gradient of fp32 logits against fp64, within 4 roundings of the probabilities subtracted.

    For random small cases, where eager PyTorch's own error, the yardstick elsewhere, is now and then 0.
    """
    case = case.to(torch.float32)
    actual = evaluate(partial(loss, backend="triton"), case, torch.ones(()))
    exact = evaluate(partial(loss, backend="reference"), case.to(torch.float64), torch.ones(()))
    assert isinstance(case.student, Logits)
    band = 4 * torch.finfo(torch.float32).eps * max(1.0, float(exact.loss))
    assert (actual.loss - exact.loss).abs() <= band
    found, truth = actual.gradients["z"], exact.gradients["z"]
    assert found is not None
    assert truth is not None
    weight = 1 + math.log(case.student.vocab)
    assert (found - truth).abs().max() <= band * weight / found.shape[0] / case.options.get("temperature", 1)


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    saved = tiles.DEFAULT
    tiles.DEFAULT = tiles.Tiles(block=32, stats_block=16, splits=3, filter_rows=2, filter_block=16)
    yield
    tiles.DEFAULT = saved


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_value_and_gradient(name: str, reduction: str) -> None:
    case = hidden_case(5, 97, 16, bias=True, softcap=20.0).to(torch.float32)
    mask = torch.tensor([True, True, False, True, True])
    weight = torch.tensor([0.5, 2.0, 1.0, 0.0, 1.5])
    case = case.having(mask=mask, token_weight=weight, temperature=1.3)
    assert_case_accurate(case.having(objective=OBJECTIVES[name], reduction=reduction), backend="triton")


# One column; less than a block; exactly one block; parts without columns; one column more than whole blocks.
@pytest.mark.parametrize("vocab", [1, 7, 32, 64, 97])
@pytest.mark.parametrize("objective", ["opsd", "jsd"])
def test_vocabulary_sizes(vocab: int, objective: str) -> None:
    assert_within_rounding(logits_case(3, vocab).having(objective=objective))


@pytest.mark.parametrize("objective", ["opsd", "reverse_kl", "jsd"])
def test_padding_equals_the_sliced_vocabulary(objective: str) -> None:
    """Columns of -inf, a whole block and a whole part of a row among them, change nothing."""
    case = logits_case(3, 40).to(torch.float32)
    assert isinstance(case.student, Logits)
    assert isinstance(case.teacher, Logits)
    z_s, z_t = (
        torch.nn.functional.pad(x.z, (33, 30), value=-torch.inf) for x in (case.student, case.teacher)
    )
    z_s.requires_grad_()
    z = case.student.z.requires_grad_()
    padded = loss(Logits(z_s), Logits(z_t), objective=objective, backend="triton")
    sliced = loss(Logits(z), case.teacher, objective=objective, backend="triton")
    padded.backward()
    sliced.backward()
    assert z_s.grad is not None
    assert z.grad is not None
    torch.testing.assert_close(padded, sliced, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(z_s.grad[:, 33:73], z.grad, rtol=1e-5, atol=1e-9)
    assert z_s.grad[:, :33].abs().max() == 0
    assert z_s.grad[:, 73:].abs().max() == 0


def test_infinite_and_nan_rows_stay_alone() -> None:
    z_s, z_t = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0)).unbind(0)
    z_s[1, 3], z_t[2, 5] = -torch.inf, torch.nan
    tokens = loss(Logits(z_s), Logits(z_t), objective="forward_kl", reduction="none", backend="triton")
    assert tokens[1] == torch.inf
    assert tokens[2].isnan()
    assert tokens[[0, 3]].isfinite().all()


def test_no_rows_and_equal_distributions() -> None:
    case = hidden_case(4, 50, 8).to(torch.float32)
    assert isinstance(case.student, Hidden)
    student = replace(case.student, hidden=case.student.hidden.requires_grad_())
    nothing = loss(student, case.teacher, mask=torch.zeros(4, dtype=torch.bool), backend="triton")
    nothing.backward()
    assert nothing == 0
    assert student.hidden.grad is not None
    assert student.hidden.grad.abs().max() == 0
    for objective in named_objectives():
        same = loss(student, replace(student, hidden=student.hidden.detach()), objective=objective)
        assert same == 0


def test_row_strides_beyond_int32() -> None:
    """Rows 2^30 apart: row 2 starts at 2^31, which an int32 offset cannot reach. In a process of its own,
    because a wrong offset is a segmentation fault."""
    program = """
import torch
from opsd_kernels.backends.triton import rows, tiles
from opsd_kernels.engine.rows import GradientForm
from opsd_kernels import Objective
tiles.DEFAULT = tiles.Tiles(block=32, splits=2)
form = GradientForm(torch.float32)
memory = torch.empty(2 * 2**30 + 64)
z_t = memory.as_strided((3, 50), (2**30, 1))
z_t.copy_(torch.randn(3, 50))
z_s, kept = torch.randn(3, 50), z_t.contiguous()
losses, _ = rows.row_gradient_(z_s, z_t, Objective("jsd"), torch.ones(3), form)
expected, _ = rows.row_gradient_(z_s, kept, Objective("jsd"), torch.ones(3), form)
assert torch.equal(losses, expected) and torch.equal(z_t, kept)
print("equal")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "equal", result.stderr


@pytest.mark.parametrize("name", ["opsd", "jsd", "token and entry clip, scaled"])
def test_token_stats(name: str) -> None:
    case = logits_case((2, 3), 97, gap=2.0).to(torch.float32)
    ids = torch.arange(6).reshape(2, 3) * 13
    options = {"objective": OBJECTIVES[name], "token_ids": ids, "temperature": 0.8}
    actual = token_stats(case.student, case.teacher, backend="triton", **options)
    exact = case.to(torch.float64)
    expected = token_stats(exact.student, exact.teacher, backend="reference", **options)
    for field, found, truth in zip(actual._fields, actual, expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=2e-6, atol=2e-6, msg=lambda m, f=field: f"{f}: {m}")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 3),
    vocab=st.integers(1, 70),
    objective=st.sampled_from(sorted(OBJECTIVES)),
    gap=st.sampled_from([1e-2, 0.3, 3.0]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    seed=st.integers(0, 2**16),
)
def test_any_case(n: int, vocab: int, objective: str, gap: float, temperature: float, seed: int) -> None:
    case = logits_case(n, vocab, gap=gap, seed=seed)
    assert_within_rounding(case.having(objective=OBJECTIVES[objective], temperature=temperature))


def test_other_devices_and_dtypes_are_refused() -> None:
    case = logits_case(2, 9)
    with pytest.raises(ValueError, match=r"backend: expected .* for float64; got 'triton'"):
        loss(case.student, case.teacher, backend="triton")
    program = """
import torch
from opsd_kernels import Logits, loss
try:
    loss(Logits(torch.zeros(1, 4)), Logits(torch.zeros(1, 4)), backend="triton")
except ValueError as error:
    print(error)
"""
    environment = {"PATH": "", "TRITON_INTERPRET": "0", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("backend: expected 'torch' or 'reference' on cpu; got 'triton'"), (
        result.stderr
    )

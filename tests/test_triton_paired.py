"""The paired-tile GEMM in Triton's interpreter against fp64 logits of the same rounded inputs.

`conftest.py` switches the interpreter on. Tiles and blocks are small, so that a case has several of each and
ragged ones; `test_accuracy_of_the_format` has the tiles of a GPU. What only a compiler can tell is in
`test_triton_paired_aot.py`.
"""

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st

from fuzzing import fuzz
from opsd_kernels.backends.triton.paired import (
    PLAIN,
    TILE,
    Blocks,
    Head,
    Tiled,
    arch_of,
    blocks_for,
    paired_logits_,
)
from opsd_kernels.backends.triton.tiled import TiledSide

CPU = torch.device("cpu")
SMALL = Blocks(rows=4, width=16, warps=4, stages=2, group=2)
FP32, FP16 = 2.0**-24, 2.0**-11
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@dataclass(frozen=True)
class Inputs:
    """Hidden states and head of a case, in the tested dtype."""

    hidden_s: torch.Tensor
    hidden_t: torch.Tensor
    weight: torch.Tensor
    head: Head = PLAIN


def inputs(rows: int, vocab: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    hidden_s, noise = torch.randn(2, rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) * 4 / width**0.5
    return Inputs(hidden_s.to(dtype), (hidden_s + 0.1 * noise).to(dtype), weight.to(dtype))


def exact(case: Inputs, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 logits, and how far fp32 arithmetic may be off: the bound of a dot product in any order."""
    head, weight = case.head, case.weight.double()
    bias = torch.zeros(len(weight)) if head.bias is None else head.bias.double()
    z = (hidden.double() @ weight.T + bias) * head.logit_scale
    size = (hidden.double().abs() @ weight.abs().T + bias.abs()) * abs(head.logit_scale)
    band = (weight.shape[1] + 4) * FP32 * size
    if head.softcap is not None:
        # The slope is at most 1; tanh itself is off by a few roundings of 1.
        z, band = head.softcap * torch.tanh(z / head.softcap), band + 8 * FP32 * head.softcap
    return z / head.temperature, band.nan_to_num(0.0, posinf=0.0) / head.temperature + 4 * FP32


def filled(case: Inputs, tile: int = 16, blocks: Blocks | None = SMALL) -> Tiled:
    tiled = Tiled.empty(len(case.hidden_s), len(case.weight), CPU, tile)
    paired_logits_(tiled, case.hidden_s, case.hidden_t, case.weight, case.head, blocks)
    return tiled


def dense(side: TiledSide) -> torch.Tensor:
    """`[C, V]` fp32 logits."""
    z = side.values.unflatten(1, (-1, side.tile)) + side.tops[..., None]
    return z.flatten(1)[:, : side.vocab]


def assert_right(tiled: Tiled, case: Inputs) -> None:
    """Logits, maxima and sums of both sides; every entry that is -inf is exactly that."""
    for hidden, side in ((case.hidden_s, tiled.student), (case.hidden_t, tiled.teacher)):
        tops, sums, tile, z = side.tops, side.sums, side.tile, dense(side)
        pads = side.values.shape[1] - side.vocab
        truth, band = exact(case, hidden)
        padded = torch.nn.functional.pad(truth, (0, pads), value=-torch.inf).unflatten(1, (-1, tile))
        by_tile = side.values.unflatten(1, (-1, tile))
        top = padded.amax(-1)
        off = torch.nn.functional.pad(band, (0, pads)).unflatten(1, (-1, tile)).amax(-1)
        live = top > -torch.inf
        assert (tops.isneginf() == ~live).all()
        assert ((tops.double() - top)[live].abs() <= off[live]).all()
        assert (by_tile.amax(-1)[live] == 0).all()  # the largest itself is stored without an error
        assert (by_tile.isneginf() == padded.isneginf()).all()
        finite = truth > -torch.inf
        fall = truth - top.repeat_interleave(tile, 1)[:, : side.vocab]
        rounding = FP16 * (fall.abs() + 2 * band) + 2.0**-25 + FP32 * truth.abs()
        assert ((z.double() - truth).abs() <= rounding + 2 * band)[finite].all()
        stored = by_tile.double().exp().sum(-1)
        torch.testing.assert_close(sums.double(), stored, rtol=tile * FP32, atol=0)
        row_top, total = side.normaliser()
        assert (row_top == tops.amax(1)).all()
        kept = row_top > -torch.inf
        log_sum = row_top.double() + total.log()
        expected = torch.logsumexp((by_tile.double() + tops.double()[..., None]).flatten(1), 1)
        torch.testing.assert_close(log_sum[kept], expected[kept], rtol=0, atol=4 * tile * FP32)
        assert (total[~kept] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
def test_logits(dtype: torch.dtype, bias: bool, softcap: float | None) -> None:
    case = inputs(11, 75, 37, dtype)
    head = Head(torch.randn(75).to(dtype) if bias else None, 0.6, softcap, 1.3)
    assert_right(filled(replace(case, head=head)), replace(case, head=head))


# One row, column or entry; exactly one block or tile; one more. The last group of row blocks is ragged.
@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("vocab", [1, 16, 33])
@pytest.mark.parametrize("width", [1, 16, 48, 49])
def test_shapes(rows: int, vocab: int, width: int) -> None:
    case = inputs(rows, vocab, width)
    assert_right(filled(case), case)


def test_strides_and_what_is_not_written() -> None:
    """Row strides of inputs and buffers, 0 among them; rows beyond C and columns beyond the tiles stay."""
    case = inputs(7, 40, 20, torch.bfloat16)
    wide = torch.randn(7, 50).bfloat16()
    strided = replace(
        case,
        hidden_s=wide[:, 3:23],
        hidden_t=wide[:1, 5:25].expand(7, 20),
        weight=torch.randn(80, 31).bfloat16()[::2, 11:],
    )
    assert strided.hidden_t.stride() == (0, 1)
    tiled = Tiled.empty(9, 40, CPU, 16)
    assert tiled.student.values.stride() == (64, 1)
    tiled.student.values.as_strided((9, 64), (64, 1)).fill_(7)
    first = tiled.first(7)
    paired_logits_(first, strided.hidden_s, strided.hidden_t, strided.weight, blocks=SMALL)
    assert_right(first, strided)
    memory = tiled.student.values.as_strided((9, 64), (64, 1))
    assert (memory[7:] == 7).all()
    assert (memory[:7, 48:] == 7).all()
    assert tiled.student.tops[7:].isnan().all()  # as `torch.empty` left them


@pytest.mark.parametrize("excluded", [[3, 17], range(16, 32), range(32, 37), range(37)])
def test_excluded_columns(excluded: list[int]) -> None:
    """Some; a whole tile; the whole of a ragged tile; the whole row."""
    bias = torch.zeros(37)
    bias[list(excluded)] = -torch.inf
    case = replace(inputs(5, 37, 20), head=Head(bias, temperature=0.7))
    tiled = filled(case)
    assert_right(tiled, case)
    assert dense(tiled.student)[:, list(excluded)].isneginf().all()


def test_out_of_the_range_of_fp16() -> None:
    """Far below the largest of the tile a logit is excluded; nothing overflows, tops are exact."""
    weight = torch.tensor([[3e38], [0.0], [1e5], [-3e38]])
    hidden = torch.ones(1, 1)
    tiled = filled(Inputs(hidden, -hidden, weight), tile=2)
    assert tiled.student.tops.tolist() == [[weight[0].item(), 1e5]]
    assert dense(tiled.student).isneginf().tolist() == [[False, True, False, True]]
    assert dense(tiled.teacher).isneginf().tolist() == [[True, False, True, False]]


def test_nan_stays_in_its_row() -> None:
    case = inputs(6, 40, 20)
    case.hidden_s[2, 5] = torch.nan
    tiled = filled(case)
    total = tiled.student.normaliser()[1]
    assert total.isnan().tolist() == [False, False, True, False, False, False]
    assert tiled.teacher.normaliser()[1].isfinite().all()


def test_no_rows() -> None:
    tiled = filled(inputs(0, 40, 20))
    assert dense(tiled.student).shape == (0, 40)


@fuzz(
    100,
    rows=st.integers(1, 9),
    vocab=st.integers(1, 50),
    width=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0, 30.0]),
    scale=st.sampled_from([0.1, 1.0, -2.0]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    blocks=st.builds(
        Blocks,
        rows=st.sampled_from([1, 2, 8]),
        width=st.sampled_from([16, 32]),
        warps=st.just(4),
        stages=st.just(2),
        group=st.integers(1, 3),
    ),
    tile=st.sampled_from([8, 16, 64]),
    seed=st.integers(0, 2**16),
)
def test_any_case(
    rows: int,
    vocab: int,
    width: int,
    dtype: torch.dtype,
    bias: bool,
    softcap: float | None,
    scale: float,
    temperature: float,
    blocks: Blocks,
    tile: int,
    seed: int,
) -> None:
    case = inputs(rows, vocab, width, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(vocab, generator=generator).to(dtype) if bias else None
    case = replace(case, head=Head(own, scale, softcap, temperature))
    assert_right(filled(case, tile, blocks), case)


def test_row_strides_beyond_int32() -> None:
    """Rows 2^30 apart in every tensor: row 2 starts at 2^31. In a process of its own, because a wrong offset
    is a segmentation fault."""
    program = """
import torch
from dataclasses import replace
from opsd_kernels.backends.triton.paired import Blocks, Tiled, paired_logits_
far = lambda dtype: torch.empty(2 * 2**30 + 64, dtype=dtype).as_strided((3, 16), (2**30, 1))
blocks = Blocks(2, 16, 4, 2)
operands = [torch.randn(3, 16).bfloat16() for _ in range(3)]
expected = Tiled.empty(3, 3, torch.device("cpu"), 16)
paired_logits_(expected, *operands, blocks=blocks)
found = Tiled.empty(3, 3, torch.device("cpu"), 16)
found = Tiled(*(replace(side, values=far(torch.float16)) for side in (found.student, found.teacher)))
paired_logits_(found, *(far(torch.bfloat16).copy_(x) for x in operands), blocks=blocks)
for a, b in ((found.student, expected.student), (found.teacher, expected.teacher)):
    assert torch.equal(a.values, b.values) and torch.equal(a.tops, b.tops) and torch.equal(a.sums, b.sums)
print("equal")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "equal", result.stderr


SLOW = pytest.mark.slow


# Spread of the logits, gap between student and teacher in nats; error of dlogits and dH that is allowed.
@pytest.mark.parametrize(
    ("spread", "gap", "bound"),
    [
        pytest.param(3, 1.0, 1e-4, marks=SLOW),
        pytest.param(3, 0.1, 1e-3, marks=SLOW),
        (3, 0.03, 3e-3),
        pytest.param(8, 1.0, 1e-4, marks=SLOW),
        pytest.param(8, 0.1, 1e-3, marks=SLOW),
        pytest.param(8, 0.03, 3e-3, marks=SLOW),
    ],
)
def test_accuracy_of_the_format(spread: float, gap: float, bound: float) -> None:
    """Forward KL's dlogits, computed from the tiles and from bf16 logits, at V = 16,384 and H = 1,024.

    The head's rows have a common part, as those of models do: it must cancel in dH = dlogits W.
    """
    rows, vocab, width = 16, 16384, 1024
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, width, generator=generator).bfloat16() / width**0.5
    hidden_t = (torch.randn(rows, width, generator=generator) * spread).bfloat16()
    # fp32 hidden states: bf16 ones a gap of 0.03 apart would mostly be the same.
    hidden_s = hidden_t.float() + torch.randn(rows, width, generator=generator) * gap
    case = Inputs(hidden_s, hidden_t.float(), weight.float())
    tiled = filled(case, TILE, Blocks(rows, width, 4, 2))
    z_s, z_t = exact(case, case.hidden_s)[0], exact(case, case.hidden_t)[0]
    truth = z_s.softmax(-1) - z_t.softmax(-1)
    head = weight.double() + 10 * torch.randn(width, generator=generator) / width**0.5

    def probabilities(side: TiledSide) -> torch.Tensor:
        top, total = side.normaliser()
        fall = side.values.float().unflatten(1, (-1, TILE)) + (side.tops - top[:, None])[..., None]
        return (fall.flatten(1) - total.log().float()[:, None]).exp()

    def errors(dlogits: torch.Tensor) -> tuple[float, float]:
        off = dlogits.double() - truth
        return float(off.norm() / truth.norm()), float((off @ head).norm() / (truth @ head).norm())

    sides = tiled.student, tiled.teacher
    p_s, p_t = (probabilities(side) for side in sides)
    bf16 = z_s.bfloat16().float().softmax(-1) - z_t.bfloat16().float().softmax(-1)
    unrounded = [
        (x - side.tops.repeat_interleave(TILE, 1)).double().exp().unflatten(1, (-1, TILE)).sum(-1)
        for x, side in zip((z_s, z_t), sides, strict=True)
    ]
    exact_s, exact_t = (replace(side, sums=sums) for side, sums in zip(sides, unrounded, strict=True))
    with_exact_sums = probabilities(exact_s) - probabilities(exact_t)
    ours, eager, other = errors(p_s - p_t), errors(bf16), errors(with_exact_sums)
    print(f"spread {spread} gap {gap}: dlogits {ours[0]:.2%}, dH {ours[1]:.2%}; bf16 logits {eager[0]:.1%}")
    print(f"    with the sums of unrounded values: dlogits {other[0]:.2%}, dH {other[1]:.2%}")
    assert max(ours) <= bound
    assert eager[0] > 100 * ours[0]
    # Why the sums are those of the rounded values.
    assert other[1] > 3 * ours[1]


def test_arguments_are_checked() -> None:
    case, tiled = inputs(4, 20, 16), Tiled.empty(4, 20, CPU, 16)
    h, weight = case.hidden_s, case.weight
    with pytest.raises(ValueError, match=r"hidden_t: expected shape \(4, 16\); got \(3, 16\)"):
        paired_logits_(tiled, h, h[:3], weight)
    with pytest.raises(ValueError, match=r"weight: expected shape \(20, 16\); got \(19, 16\)"):
        paired_logits_(tiled, h, h, weight[:19])
    with pytest.raises(ValueError, match=r"hidden_s: expected shape \(4, 16\); got \(3, 16\)"):
        paired_logits_(tiled, h[:3], h[:3], weight)
    with pytest.raises(ValueError, match=r"weight: expected .* the same for all; got torch.float16"):
        paired_logits_(tiled, h, h, weight.half())
    with pytest.raises(ValueError, match=r"hidden_t: expected .* got torch.float64"):
        paired_logits_(tiled, h.double(), h.double(), weight.double())
    with pytest.raises(ValueError, match="weight: expected an inner stride of 1; got 20"):
        paired_logits_(tiled, h, h, weight.T.contiguous().T)
    with pytest.raises(ValueError, match=r"bias: expected shape \(20,\); got \(19,\)"):
        paired_logits_(tiled, h, h, weight, Head(torch.zeros(19)))


def test_block_sizes() -> None:
    assert arch_of(CPU) == "sm_80"
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for dtype in DTYPES:
            for aligned in (True, False):
                blocks = blocks_for(arch, dtype, aligned)
                accumulators = 2 * blocks.rows * TILE / (blocks.warps * 32)
                assert accumulators <= 128  # of 255 registers a thread

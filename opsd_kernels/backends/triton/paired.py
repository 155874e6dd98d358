"""Student's and teacher's logits of the same tokens by one GEMM that reads the shared head once.

A program computes a `[BLOCK_M, TILE]` tile of z_s = h_s W^T and the same tile of z_t = h_t W^T: it loads a
block of W once for both and accumulates in fp32. Its epilogue stores `fp16(z - top)`, where `top` is the
largest logit of that row in that tile, and keeps `top` and the sum of exp(z - top) in fp32. In 2 bytes an
entry the likely ones are exact to a few 1e-4 nats, so that the difference of two close distributions
survives; bf16 logits lose it. A row kernel needs no normaliser pass: `TiledSide.normaliser` combines the
tiles' sums.

Which exponentials are summed: those of the stored, rounded values, which is what a row kernel reads back,
not those of the fp32 logits. Both err alike in the L2 norm of dlogits. But then the probabilities of a row
sum to 1, dlogits sum to 0 over the vocabulary, and the part that all rows of a head share cancels in dH as it
should; with the exact sums it does not, and the error of dH was up to ten times as large.

Not yet measured on a GPU: checked in Triton's interpreter, and compiled ahead of time for every target.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from opsd_kernels.backends.triton.tiled import TiledSide

# Columns that share a maximum, and the width of a program's tile: the same on every GPU, so that what is
# stored does not depend on the GPU's block sizes.
TILE = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _place(rows, V, BLOCK_M: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Row block and tile of this program.

    Programs that run at the same time share `GROUP` row blocks and few tiles, which stay in the L2 cache; W
    is read from memory once per group of row blocks.
    """
    row_blocks, tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(V, TILE)
    program = tl.program_id(0)
    first = program // (GROUP * tiles) * GROUP
    # Neither this maximum nor the last minimum changes anything: they let the ahead-of-time check of offsets
    # see that columns stay within int32.
    height = tl.maximum(tl.minimum(row_blocks - first, GROUP), 1)
    inside = program % (GROUP * tiles)
    return first + inside % height, tl.minimum(inside // height, tiles - 1)


@triton.jit
def _operand(pointers, k, H, axis: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr):
    """A block of an operand; `k` are its columns, along `axis` of the block."""
    mask = None if EVEN else tl.expand_dims(k < H, 1 - axis)
    block = tl.load(pointers, mask=mask, other=None if EVEN else 0.0)
    # The interpreter cannot multiply bf16; a GPU's tensor cores need their operands as they are.
    return block.to(tl.float32) if WIDEN else block


@triton.jit
def _logits(product, columns, V, inner, outer, SOFTCAP: tl.constexpr):
    """z / T of a tile of products, -inf past the vocabulary.

    inner, outer: logit scale / T and 1; with a soft-cap, logit scale / cap and cap / T.
    """
    z = product * inner
    if SOFTCAP:
        # tanh, within 2 roundings of the cap; where the exponential overflows this is the cap itself.
        z = (1 - 2 / (1 + tl.exp(2 * z))) * outer
    return tl.where((columns < V)[None, :], z, -float("inf"))


@triton.jit
def _store(z, values, tops, sums, row, columns, tile, tiles, rows, stride):
    """Values, maximum and sum of a side's tile; rows past the end are not written."""
    live = row < rows
    top = tl.max(z, 1)
    # A tile of excluded columns alone has values of -inf, a maximum of -inf and a sum of 0.
    stored = (z - tl.where(top == -float("inf"), 0.0, top)[:, None]).to(tl.float16)
    total = tl.sum(tl.exp(stored.to(tl.float32)), 1)
    tl.store(values + row[:, None] * stride + columns[None, :], stored, mask=live[:, None])
    tl.store(tops + row * tiles + tile, top, mask=live)
    tl.store(sums + row * tiles + tile, total, mask=live)


@triton.jit(do_not_specialize=["rows"])
def paired_kernel(
    values_s, values_t, tops_s, tops_t, sums_s, sums_t, hidden_s, hidden_t, weight, bias,
    rows, V, H, stride_values_s, stride_values_t, stride_s, stride_t, stride_w, inner, outer,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of both sides; the arguments are those of `Tiled`, `Head` and `paired_logits_`.

    EVEN: H is a multiple of BLOCK_K. WIDEN: multiply in fp32.
    """
    row_block, tile = _place(rows, V, BLOCK_M, TILE, GROUP)
    row = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile * TILE + tl.arange(0, TILE)
    # Past the end the last row and column are read again, which needs no mask; nothing of them is kept.
    source = tl.minimum(row, rows - 1)[:, None]
    entry = tl.minimum(columns, V - 1)[None, :].to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    from_s = hidden_s + source * stride_s + k[None, :]
    from_t = hidden_t + source * stride_t + k[None, :]
    from_w = weight + entry * stride_w + k[:, None]
    product_s = tl.zeros((BLOCK_M, TILE), tl.float32)
    if BIAS:
        # Here, since after the loop there are no registers for it: the accumulators occupy half of them.
        product_s += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    product_t = product_s
    for start in range(0, H, BLOCK_K):
        block_w = _operand(from_w, start + k, H, 0, EVEN, WIDEN)
        block_s = _operand(from_s, start + k, H, 1, EVEN, WIDEN)
        block_t = _operand(from_t, start + k, H, 1, EVEN, WIDEN)
        # "ieee" concerns fp32 operands: TF32 would round them to 10 bits.
        product_s = tl.dot(block_s, block_w, product_s, input_precision="ieee")
        product_t = tl.dot(block_t, block_w, product_t, input_precision="ieee")
        from_s += BLOCK_K
        from_t += BLOCK_K
        from_w += BLOCK_K
    tiles = tl.cdiv(V, TILE)
    z = product_s
    # A loop, from which nothing is hoisted: of straight code for both sides the compiler would do the
    # exponentials of both first, and spill.
    for side in tl.range(0, 2, disable_licm=True):
        values = tl.where(side == 0, values_s, values_t)
        stride = tl.where(side == 0, stride_values_s, stride_values_t)
        tops = tl.where(side == 0, tops_s, tops_t)
        sums = tl.where(side == 0, sums_s, sums_t)
        z = _logits(z, columns, V, inner, outer, SOFTCAP)
        _store(z, values, tops, sums, row, columns, tile, tiles, rows, stride)
        z = product_t


@dataclass(frozen=True)
class Blocks:
    """Sizes of a program's blocks: rows of each side, columns of H a step, warps, steps in flight.

    `group` row blocks share the tiles of W that are in the L2 cache.
    """

    rows: int
    width: int
    warps: int
    stages: int
    group: int = 8


def blocks_for(arch: str, dtype: torch.dtype, aligned: bool = True) -> Blocks:
    """The block sizes for a GPU: "sm_80", "sm_90", "sm_100" or "gfx942", and for the operands.

    With 2-byte operands the two accumulators of 128 x 128 are what a 128 x 256 tile of one GEMM has: 128
    registers a thread. fp32 runs without tensor cores on NVIDIA.

    Args:
        arch: the GPU's name.
        dtype: of the operands.
        aligned: whether rows are read 16 bytes at a time; entry by entry takes more registers.
    """
    if dtype == torch.float32:
        return Blocks(64, 16, 8, 2)
    if not aligned:
        return Blocks(64, 32, 8, 2)
    return {
        # 72 KiB, so that GPUs of 99 KiB (compute capability 8.6, 8.9, 12.0) take it as well.
        "sm_80": Blocks(128, 32, 8, 4),
        "sm_90": Blocks(128, 64, 8, 4),
        "sm_100": Blocks(128, 64, 8, 4),
        "gfx942": Blocks(128, 32, 8, 2),
    }[arch]


def arch_of(device: torch.device) -> str:
    """Which entry of `blocks_for` fits a device; the smallest of NVIDIA's where there is no better one."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


@dataclass(frozen=True)
class Head:
    """What follows the product: z = softcap tanh((h W^T + bias) logit_scale / softcap) / temperature.

    Args:
        bias: `[V]`; -inf excludes a column, unless there is a soft-cap.
        logit_scale: factor of the logits.
        softcap: bound of the logits before the temperature, or None.
        temperature: T.
    """

    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


PLAIN = Head()


@dataclass(frozen=True)
class Tiled:
    """Buffers for the logits of both sides.

    From V on up to the end of the last tile values are -inf. A logit more than 65,504 below the largest of
    its tile counts as excluded.
    """

    student: TiledSide
    teacher: TiledSide

    @classmethod
    def empty(cls, rows: int, vocab: int, device: torch.device, tile: int = TILE) -> "Tiled":
        """For `rows` rows, uninitialised: 4 bytes an entry for both sides, and 3 % for statistics.

        The rows' stride is a multiple of 64 entries, so that GEMMs read them aligned.
        """
        tiles = triton.cdiv(vocab, tile)
        stride = triton.cdiv(tiles * tile, 64) * 64
        values = torch.empty(2, rows, stride, dtype=torch.float16, device=device)[..., : tiles * tile]
        statistics = torch.empty(2, 2, rows, tiles, dtype=torch.float32, device=device)
        return cls(*(TiledSide(vocab, tile, values[side], *statistics[side]) for side in range(2)))

    def first(self, rows: int) -> "Tiled":
        """The first rows of the same buffers."""
        return Tiled(
            *(
                replace(side, values=side.values[:rows], tops=side.tops[:rows], sums=side.sums[:rows])
                for side in (self.student, self.teacher)
            )
        )


def paired_logits_(
    tiled: Tiled,
    hidden_s: torch.Tensor,
    hidden_t: torch.Tensor,
    weight: torch.Tensor,
    head: Head = PLAIN,
    blocks: Blocks | None = None,
) -> None:
    """Fills `tiled` with the logits of both sides under one head.

    Args:
        tiled: buffers for C rows and V entries; overwritten.
        hidden_s: `[C, H]` student's hidden states, bf16, fp16 or fp32; any row stride, inner stride 1.
        hidden_t: `[C, H]` teacher's, of the same dtype.
        weight: `[V, H]` head of both, of the same dtype.
        head: bias, logit scale, soft-cap and temperature of both.
        blocks: sizes of the blocks, by default those for the device.

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take.
    """
    rows, width = hidden_s.shape
    _check("hidden_t", hidden_t, (rows, width), hidden_s.dtype)
    s, t = tiled.student, tiled.teacher
    _check("weight", weight, (s.vocab, width), hidden_s.dtype)
    _check("hidden_s", hidden_s, (s.shape[0], width), hidden_s.dtype)
    if head.bias is not None and head.bias.shape != (s.vocab,):
        raise ValueError(f"bias: expected shape {(s.vocab,)}; got {tuple(head.bias.shape)}")
    aligned = width % 16 == 0 and all(
        x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0 for x in (hidden_s, hidden_t, weight)
    )
    blocks = blocks or blocks_for(arch_of(weight.device), weight.dtype, aligned)
    if head.softcap is None:
        factors = head.logit_scale / head.temperature, 1.0
    else:
        factors = head.logit_scale / head.softcap, head.softcap / head.temperature
    bias = weight if head.bias is None else head.bias.contiguous()
    strides = (x.stride(0) for x in (s.values, t.values, hidden_s, hidden_t, weight))
    programs = triton.cdiv(rows, blocks.rows) * triton.cdiv(s.vocab, s.tile)
    if not programs:
        return
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        paired_kernel[(programs,)](
            s.values, t.values, s.tops, t.tops, s.sums, t.sums, hidden_s, hidden_t, weight, bias,
            rows, s.vocab, width, *strides, *factors,
            **constants(head.bias is not None, head.softcap is not None, width, s.tile, blocks),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}; got {tuple(tensor.shape)}")
    if dtype not in DTYPES or tensor.dtype != dtype:
        raise ValueError(f"{name}: expected one of bf16, fp16, fp32, the same for all; got {tensor.dtype}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name}: expected an inner stride of 1; got {tensor.stride(1)}")


def constants(bias: bool, softcap: bool, width: int, tile: int, blocks: Blocks) -> dict[str, Any]:
    """The kernel's compile-time constants for a head with or without bias and soft-cap, and H."""
    return {
        "BIAS": bias,
        "SOFTCAP": softcap,
        "EVEN": width % blocks.width == 0,
        "WIDEN": triton.knobs.runtime.interpret,
        "BLOCK_M": blocks.rows,
        "TILE": tile,
        "BLOCK_K": blocks.width,
        "GROUP": blocks.group,
    }

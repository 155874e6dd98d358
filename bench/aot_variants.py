"""Every variant of every Triton kernel that a launch can ask for."""

from dataclasses import dataclass, field
from typing import Any

import torch

from opsd_kernels import divergences
from opsd_kernels.backends.triton import kernels, paired
from opsd_kernels.backends.triton.tiles import TILES

# Types of the kernels' arguments by name; `*fp32` where a name is neither here nor in a variant's `types`.
TYPES = {
    **dict.fromkeys(("V", "C", "rows", "H", "tiles"), "i32"),
    **dict.fromkeys(("stride", "stride_s", "stride_t", "stride_dz", "stride_w"), "i64"),
    **dict.fromkeys(("stride_values_s", "stride_values_t"), "i64"),
    **dict.fromkeys(("beta", "tau", "cap", "inner", "outer"), "fp32"),
    "live": "*i8",
}
# Largest values of integer arguments. A stride has none.
BOUNDS = {"V": 1 << 30, "C": 1 << 30, "rows": 1 << 30, "H": 1 << 20}
# Constants that tell the variants of a kernel apart.
LABELS = ("NAME", "CLIP", "CAPPED", "TILE", "BIAS", "SOFTCAP")
CLIPS = ("none", "zero", "scale")


@dataclass(frozen=True)
class Variant:
    """A kernel as a launch compiles it.

    Args:
        kernel: the `triton.jit` function.
        constants: compile-time constants by name; those in `LABELS` tell the variants of a kernel apart.
        types: types of arguments that `TYPES` does not have or has otherwise, as `{"dz": "*bf16"}`.
        num_warps: of a program.
        num_stages: of its pipelined loops.
        grid: number of programs on each axis at most, None where it is not bounded.
        divisible: arguments that are multiples of 16, which a launch finds out by itself.
        target: the only one it is compiled for, None for all.
    """

    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    grid: tuple[int | None, ...] = ()
    divisible: tuple[str, ...] = ()
    target: str | None = None

    @property
    def label(self) -> str:
        """Name and what distinguishes it."""
        chosen = [
            str(value) if isinstance(value, str) else f"{key.lower()} {value}"
            for key, value in self.constants.items()
            if key in LABELS and value not in (False, 0)
        ]
        others = sorted({kind.removeprefix("*") for kind in self.types.values()} - {"fp32"})
        return " ".join([self.kernel.__name__.removesuffix("_kernel"), *chosen, *others])

    @property
    def has_less_than_another(self) -> bool:
        """Whether some variant is this one and the gradient of a scaled clip or of a soft-cap besides."""
        return self.constants.get("CLIP", "scale") != "scale" or not self.constants.get("CAPPED", True)

    def type_of(self, argument: str) -> str:
        """Triton's name of an argument's type."""
        if argument in self.constants:
            return "constexpr"
        return self.types.get(argument, TYPES.get(argument, "*fp32"))


def variants() -> list[Variant]:
    """Those of all kernels."""
    return row_variants() + paired_variants()


def row_variants() -> list[Variant]:
    """The row kernels: with every divergence and clip, on fp32 logits and on tiles of 2 bytes an entry."""
    (shape,) = set(TILES.values())  # one for all targets, so far
    common: dict[str, Any] = {"num_warps": shape.warps, "grid": (None, shape.splits)}
    sizes: dict[str, Any] = {"SPLITS": shape.splits, "BLOCK": shape.block}
    tiled = {"z_s": "*fp16", "z_t": "*fp16"}
    found = [Variant(kernels.normaliser_kernel, sizes, **common)]
    for dz in ("*fp32", "*bf16"):
        for capped in (False, True):
            constants = {"CAPPED": capped, **sizes}
            found.append(Variant(kernels.softmax_gradient_kernel, constants, {"dz": dz}, **common))
        filters = {"ROWS": shape.filter_rows, "BLOCK": shape.filter_block}
        columns: dict[str, Any] = {"num_warps": shape.warps, "grid": (BOUNDS["V"] // shape.filter_block,)}
        found.append(Variant(kernels.live_columns_kernel, filters, {"dz": dz}, **columns))
    formats: tuple[tuple[int, dict[str, str]], ...] = ((0, {}), (paired.TILE, tiled))
    for name, divergence in divergences.table().items():
        entry: dict[str, Any] = {"NAME": name, "MIXTURE": divergence.uses_mixture}
        sizes = {"SPLITS": shape.splits, "BLOCK": shape.block_of(name)}
        for tile, types in formats:
            # 2-byte gradients over fp32 logits have one program a row.
            splits = shape.splits if tile else 1
            for clip in CLIPS:
                constants = {**entry, "CLIP": clip, "TILE": tile, **sizes}
                found.append(Variant(kernels.loss_kernel, constants, types, **common))
                for capped in (False, True):
                    gradient = {**constants, "CAPPED": capped, "SPLITS": splits}
                    rest = {**common, "grid": (None, splits)}
                    found.append(Variant(kernels.gradient_kernel, gradient, {**types, "dz": "*bf16"}, **rest))
            constants = {**entry, "TILE": tile, **sizes, "BLOCK": shape.stats_block}
            found.append(Variant(kernels.stats_kernel, constants, types, **common))
        constants = {**entry, "CLIP": "scale", "CAPPED": True, "TILE": 0, **sizes}
        found.append(Variant(kernels.gradient_kernel, constants, {"dz": "*fp32"}, **common))
    return found


def paired_variants() -> list[Variant]:
    """The paired-tile GEMM, whose blocks differ by target: with and without bias, soft-cap and alignment."""
    found = []
    for target in TILES:
        for kind, dtype in (("*bf16", torch.bfloat16), ("*fp32", torch.float32)):
            for bias, softcap in ((False, False), (True, True)):
                for aligned in (True, False):
                    found.append(_paired_variant(target, kind, dtype, bias, softcap, aligned))
    return found


def _paired_variant(
    target: str, kind: str, dtype: torch.dtype, bias: bool, softcap: bool, aligned: bool
) -> Variant:
    blocks = paired.blocks_for(target, dtype, aligned)
    operands = ("hidden_s", "hidden_t", "weight", "bias")
    buffers = ("values_s", "values_t", "tops_s", "tops_t", "sums_s", "sums_t")
    strides = ("stride_values_s", "stride_values_t")
    known = (*operands, "stride_s", "stride_t", "stride_w", "H") if aligned else ()
    width = blocks.width * 16 if aligned else blocks.width * 16 - 1
    return Variant(
        paired.paired_kernel,
        {**paired.constants(bias, softcap, width, paired.TILE, blocks), "WIDEN": False},
        {**dict.fromkeys(operands, kind), "values_s": "*fp16", "values_t": "*fp16"},
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        grid=(1 << 30,),
        divisible=(*buffers, *strides, *known),
        target=target,
    )

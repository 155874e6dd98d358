"""Compiles every Triton kernel for every target without a device: `python -m bench.aot`.

Prints registers, stack, spills and shared memory of each variant; exits with 1 if one spills, has a stack
frame, needs more shared memory than the target has, or adds floats atomically.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from opsd_kernels import divergences
from opsd_kernels.backends.triton import kernels, rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TYPES = {"V": "i32", "stride_s": "i64", "stride_t": "i64", "beta": "fp32", "tau": "fp32"}
FLOAT_ATOMIC = re.compile(
    r"\b(atom|red)\.\S*add\S*\.(f16|bf16|f32|f64)|atomic_add_(f32|f64|pk)|atomic_pk_add"
)


@dataclass(frozen=True)
class Variant:
    """A kernel by name, with its compile-time constants."""

    kernel: str
    constants: tuple[tuple[str, Any], ...]

    @property
    def label(self) -> str:
        """Name and what distinguishes it."""
        chosen = [str(value) for key, value in self.constants if key in ("NAME", "CLIP")]
        return " ".join([self.kernel.removesuffix("_kernel"), *chosen])


@dataclass(frozen=True)
class Usage:
    """What a compiled variant takes: registers of a thread, bytes of stack, spills and shared memory."""

    target: str
    variant: Variant
    registers: int
    stack: int
    spills: int
    shared: int
    float_atomics: int

    @property
    def good(self) -> bool:
        """Whether the variant passes."""
        return (
            not (self.stack or self.spills or self.float_atomics) and self.shared <= SHARED_LIMIT[self.target]
        )


def variants() -> list[Variant]:
    """Every kernel with every divergence and clip that a launch can ask for."""
    found = [Variant("normaliser_kernel", _sizes(rows.BLOCK))]
    for name, divergence in divergences.table().items():
        entry = (("NAME", name), ("MIXTURE", divergence.uses_mixture))
        for clip in ("none", "zero", "scale"):
            constants = (*entry, ("CLIP", clip), *_sizes(rows.BLOCK))
            found += [Variant("loss_kernel", constants), Variant("gradient_kernel", constants)]
        found.append(Variant("stats_kernel", (*entry, *_sizes(rows.STATS_BLOCK))))
    return found


def _sizes(block: int) -> tuple[tuple[str, int], ...]:
    return (("SPLITS", rows.SPLITS), ("BLOCK", block))


def usage(job: tuple[str, Variant]) -> Usage:
    """Compiles a variant for a target and reads what it takes."""
    target, variant = job
    kernel, constants = getattr(kernels, variant.kernel), dict(variant.constants)
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, "*fp32") for name in kernel.arg_names
    }
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    options = {"num_warps": rows.WARPS, "enable_fp_fusion": True}
    compiled = compile_kernel(source, target=TARGETS[target], options=options)
    text = compiled.asm["ptx" if target.startswith("sm") else "amdgcn"]
    found = _nvidia(compiled.asm["cubin"]) if target.startswith("sm") else _amd(text)
    return Usage(target, variant, *found, compiled.metadata.shared, len(FLOAT_ATOMIC.findall(text)))


def _nvidia(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and local memory by cuobjdump, which ships in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (_number(rf"{field}:(\d+)", text) for field in ("REG", "STACK", "LOCAL"))
    return registers, stack, local


def _amd(text: str) -> tuple[int, int, int]:
    """Registers, private segment and spilled registers from the assembly's metadata."""
    spills = _number(r"\.vgpr_spill_count:\s+(\d+)", text) + _number(r"\.sgpr_spill_count:\s+(\d+)", text)
    stack = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
    return _number(r"\.vgpr_count:\s+(\d+)", text), stack, spills


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern!r} in what the compiler reports")
    return int(match.group(1))


def main() -> None:
    """Compiles everything, prints the table, exits with 1 on a variant that does not pass."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    jobs = [(target, variant) for target in arguments.targets for variant in variants()]
    with ProcessPoolExecutor(arguments.processes) as pool:
        results = list(pool.map(usage, jobs))
    table = Table(title=f"Triton {triton.__version__}, {rows.WARPS} warps: registers a thread")
    table.add_column("kernel")
    for target in arguments.targets:
        table.add_column(target, justify="right")
    for variant in variants():
        cells = [str(result.registers) for result in results if result.variant == variant]
        table.add_row(variant.label, *cells)
    Console(width=100).print(table)
    bad = [result for result in results if not result.good]
    for result in bad:
        print(f"FAILED {result}")
    print(f"{len(results) - len(bad)} of {len(results)} variants without stack, spills or float atomics")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

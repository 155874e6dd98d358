"""Compiles every Triton kernel for every target without a device: `python -m bench.aot`.

Prints registers and shared memory of each variant; exits with 1 if one spills, has a stack frame, needs more
shared memory than the target has, adds floats atomically, or has a pointer offset that can leave int32 (the
rule is in `bench.aot_ttir`).
"""

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as compile_kernel

from bench.aot_ttir import overflows
from bench.aot_variants import BOUNDS, Variant, variants

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# Offsets are the same for every target; this one has the fewest steps after TTIR.
OFFSETS_TARGET = "gfx942"
FLOAT_ATOMIC = re.compile(
    r"\b(atom|red)\.\S*add\S*\.(f16|bf16|f32|f64)|atomic_add_(f32|f64|pk)|atomic_pk_add"
)


@dataclass(frozen=True)
class Usage:
    """What a compiled variant takes: registers of a thread, bytes of stack, spills and shared memory."""

    target: str
    label: str
    registers: int
    stack: int
    spills: int
    shared: int
    float_atomics: int

    @property
    def good(self) -> bool:
        """Whether the variant passes."""
        wrong = self.stack or self.spills or self.float_atomics
        return not wrong and self.shared <= SHARED_LIMIT[self.target]


def usage(target: str, variant: Variant) -> Usage:
    """Compiles a variant for a target and reads what it takes."""
    source, options = _source(variant, strides="i64")
    compiled = compile_kernel(source, target=TARGETS[target], options=options)
    text = compiled.asm["ptx" if target.startswith("sm") else "amdgcn"]
    found = _nvidia(compiled.asm["cubin"]) if target.startswith("sm") else _amd(text)
    atomics = len(FLOAT_ATOMIC.findall(text))
    return Usage(target, variant.label, *found, compiled.metadata.shared, atomics)


def narrow_offsets(variant: Variant) -> list[str]:
    """Offsets of a variant that can leave int32.

    A launch passes a stride below 2^31 as int32, and then it is the kernel that has to widen: so strides are
    int32 here, where those of `usage` are int64, which takes the most registers.
    """
    source, options = _source(variant, strides="i32")
    return overflows(_ttir(source, TARGETS[variant.target or OFFSETS_TARGET], options), BOUNDS, variant.grid)


def _ttir(source: ASTSource, target: GPUTarget, given: dict[str, Any]) -> str:
    """The text of the first stage of `triton.compile`, without the others."""
    backend = make_backend(target)
    options = backend.parse_options(given)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, functions, modules, context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))


def _source(variant: Variant, strides: str) -> tuple[ASTSource, dict[str, Any]]:
    """A variant as Triton's compiler takes it, and its options."""
    kernel = variant.kernel
    signature = {name: variant.type_of(name) for name in kernel.arg_names}
    signature |= {
        name: strides for name in signature if name.startswith("stride") and signature[name] == "i64"
    }
    constexprs = {(kernel.arg_names.index(name),): value for name, value in variant.constants.items()}
    known = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=known)
    options = {
        "num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    return source, options


def _examine(targets: list[str], spread: bool, number: int) -> tuple[list[Usage], list[str]]:
    """Usage by target and narrow offsets; by number, since kernels cannot be sent to another process."""
    variant = variants()[number]
    asked = [target for target in targets if variant.target in (None, target)]
    if spread and variant.has_less_than_another:
        asked = asked[number % len(asked) :][:1]
    return [usage(target, variant) for target in asked], narrow_offsets(variant) if asked else []


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
    parser.add_argument(
        "--spread",
        action="store_true",
        help="variants without another one's clip or cap are compiled for one target each, in turn",
    )
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    examine = partial(_examine, arguments.targets, arguments.spread)
    with ProcessPoolExecutor(arguments.processes) as pool:
        groups = list(pool.map(examine, range(len(variants()))))
    table = Table(title=f"Triton {triton.__version__}: registers a thread, KiB of shared memory")
    table.add_column("kernel")
    for target in arguments.targets:
        table.add_column(target, justify="right")
    for found, _ in groups:
        by_target = {x.target: f"{x.registers:3d} {x.shared / 1024:5.1f}" for x in found}
        if found:
            table.add_row(found[0].label, *(by_target.get(target, "") for target in arguments.targets))
    Console(width=100).print(table)
    results = [x for found, _ in groups for x in found]
    bad = [x for x in results if not x.good]
    narrow = {found[0].label: offsets for found, offsets in groups if offsets}
    for x in bad:
        print(f"FAILED {x}")
    for label, offsets in narrow.items():
        print(f"FAILED {label}: offsets that can leave int32:", *offsets, sep="\n  ")
    print(f"{len(results) - len(bad)} of {len(results)} variants without stack, spills or float atomics")
    print(f"{len(groups) - len(narrow)} of {len(groups)} kernels without narrow offsets")
    sys.exit(bool(bad or narrow))


if __name__ == "__main__":
    main()

"""The ahead-of-time check of the kernels: all pass, and planted faults do not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.aot_ttir import Range, overflows

ROOT = Path(__file__).parents[1]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python from the root, with Triton's compiler instead of its interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "python"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target() -> None:
    """With every divergence and dtype; what has less than another variant, for one target each in turn."""
    result = python("-m", "bench.aot", "--spread")
    assert result.returncode == 0, result.stdout + result.stderr
    (compiled,) = re.findall(r"(\d+) of \1 variants without stack, spills or float atomics", result.stdout)
    assert int(compiled) >= 470
    (kernels,) = re.findall(r"(\d+) of \1 kernels without narrow offsets", result.stdout)
    assert int(kernels) >= 100


def test_a_kernel_that_spills_is_found() -> None:
    """Blocks of 32,768 columns do not fit the registers."""
    program = """
from dataclasses import replace
from bench.aot import usage, variants
variant = next(v for v in variants() if v.label == "gradient jsd none bf16")
found = usage("sm_90", replace(variant, constants={**variant.constants, "BLOCK": 32768}))
print(found.good, found.stack + found.spills > 1000)
"""
    result = python("-c", program)
    assert result.stdout.split() == ["False", "True"], result.stdout + result.stderr


PLANTED = """
import json
import triton
import triton.language as tl
from bench.aot import narrow_offsets
from bench.aot_variants import Variant

@triton.jit
def narrow_row(z, out, V, stride, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out + columns, tl.load(z + tl.program_id(0) * stride + columns, mask=columns < V))

@triton.jit
def widened_too_late(z, out, V, stride, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out + columns, tl.load(z + (tl.program_id(0) * stride).to(tl.int64) + columns))

@triton.jit
def widened(z, out, V, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + columns, tl.load(z + row * stride + columns, mask=columns < V))

@triton.jit
def in_a_loop(z, out, V, stride, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(V):
        total += tl.load(z + row * stride + tl.arange(0, BLOCK))
    tl.store(out + tl.arange(0, BLOCK), total)

@triton.jit
def carried(z, out, V, stride, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    offset = 1
    for row in range(V):
        total += tl.load(z + offset + tl.arange(0, BLOCK))
        offset = offset * 3
    tl.store(out + tl.arange(0, BLOCK), total)

@triton.jit
def of_a_loaded_index(z, rows, out, stride, BLOCK: tl.constexpr):
    row = tl.load(rows + tl.program_id(0))
    tl.store(out + tl.arange(0, BLOCK), tl.load(z + row * stride + tl.arange(0, BLOCK)))

@triton.jit
def through_a_branch(z, out, V, stride, BLOCK: tl.constexpr):
    offset = tl.program_id(0)
    if V > 5:
        offset = tl.where(V > 7, offset * stride, 0)
    tl.store(out + tl.arange(0, BLOCK), tl.load(z + offset + tl.arange(0, BLOCK)))

@triton.jit
def unused(z, out, V, stride, BLOCK: tl.constexpr):
    live = tl.program_id(0) * stride < V
    tl.store(out + tl.arange(0, BLOCK), tl.load(z + tl.arange(0, BLOCK), mask=live))

def found(kernel, grid=(None, 4), **types):
    variant = Variant(kernel, {"BLOCK": 1024}, {"stride": "i64", **types}, grid=grid)
    return len(narrow_offsets(variant))

print(json.dumps({
    **{kernel.__name__: found(kernel) for kernel in (
        narrow_row, widened_too_late, widened, in_a_loop, carried, through_a_branch, unused)},
    "unbounded grid": found(widened, grid=(None, None)),
    "int32 index": found(of_a_loaded_index, rows="*i32"),
    "int64 index": found(of_a_loaded_index, rows="*i64"),
}))
"""


def test_what_has_less_than_another_variant_has_one_that_has_more() -> None:
    program = """
from bench.aot_variants import variants
def known(one, **more):
    constants = one.constants | {name: value for name, value in more.items() if name in one.constants}
    return one.kernel.__name__, tuple(constants.items()), tuple(one.types.items())
all_of_them = {known(one) for one in variants()}
less = [one for one in variants() if one.has_less_than_another]
print(len(less), all(known(one, CLIP="scale", CAPPED=True) in all_of_them for one in less))
"""
    result = python("-c", program)
    assert result.stdout.split() == ["142", "True"], result.stdout + result.stderr


def test_offsets_that_can_leave_int32_are_found(tmp_path: Path) -> None:
    file = tmp_path / "planted.py"  # Triton reads a kernel's source from its file
    file.write_text(PLANTED)
    result = python(str(file))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    clean = {name for name, count in found.items() if count == 0}
    assert clean == {"widened", "unused", "int64 index"}, found


def test_the_intervals_of_a_hand_written_function() -> None:
    """A product that just fits passes; one more is an error; so is a truncation, and a shift."""
    template = """
module {{
  tt.func public @k(%z: !tt.ptr<f32> loc("z"(#loc)), %V: i32, %n: i64) attributes {{noinline = false}} {{
    %c = arith.constant {factor} : i32 loc(#loc3)
    %x = tt.get_program_id x : i32 loc(#loc4)
    %p = {operation} loc(#loc5)
    %a = tt.addptr %z, %p : !tt.ptr<f32>, i32 loc(#loc6)
    tt.return loc(#loc)
  }} loc(#loc)
}} loc(#loc)
"""

    def found(operation: str, factor: int = 1) -> list[str]:
        return overflows(template.format(operation=operation, factor=factor), {"V": 1 << 20}, (1 << 11,))

    assert found("arith.muli %V, %c : i32", factor=2047) == []
    assert len(found("arith.muli %V, %c : i32", factor=2048)) == 1
    assert found("arith.muli %x, %V : i32") == []  # 2047 x 2^20
    assert found("arith.shli %V, %c : i32", factor=10) == []
    assert len(found("arith.shli %V, %c : i32", factor=11)) == 1
    (message,) = found("arith.trunci %n : i64 to i32")
    assert message.startswith("%p = arith.trunci %n : i64 to i32  reaches  %a = tt.addptr")
    assert found("arith.remsi %x, %c : i32", factor=7) == []


def test_ranges_keep_what_they_stem_from() -> None:
    joined = Range(0, 1, "here").join(Range(5, 6))
    assert joined == Range(0, 6, "here")
    assert Range(1, 5).within(joined)
    assert not Range(1, 7).within(joined)
    assert not Range(1, 5, "there").within(Range(0, 6))

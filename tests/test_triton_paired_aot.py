"""The paired-tile GEMM compiled for GPUs that are not there: what only a compiler can tell.

`python -m bench.aot` compiles its variants too; here it is told what a launch finds out by itself, and asked
which instructions came of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

COMPILE = """
import json, re, sys
import torch
from bench.aot import TARGETS, _amd, _nvidia
from triton.compiler import ASTSource, compile as compile_kernel
from opsd_kernels.backends.triton.paired import TILE, blocks_for, constants, paired_kernel as kernel

def compiled(arch, dtype, bias, softcap, width, aligned):
    blocks = blocks_for(arch, {"fp32": torch.float32}.get(dtype, torch.bfloat16), aligned)
    fixed = constants(bias, softcap, width, TILE, blocks)
    operands = ("hidden_s", "hidden_t", "weight", "stride_s", "stride_t", "stride_w")
    types = dict.fromkeys(operands[:3] + ("bias",), "*" + dtype) | {"values_s": "*fp16", "values_t": "*fp16"}
    types |= dict.fromkeys(("rows", "V", "H"), "i32") | dict.fromkeys(("inner", "outer"), "fp32")
    signature, divisible = {}, {}
    for i, name in enumerate(kernel.arg_names):
        stride = "i64" if name.startswith("stride") else "*fp32"
        signature[name] = "constexpr" if name in fixed else types.get(name, stride)
        # What a launch finds out by itself: the buffers are aligned always, the operands if `aligned`.
        known = signature[name].startswith("*") or name.startswith("stride")
        if (known and (aligned or name not in operands)) or (name == "H" and width % 16 == 0):
            divisible[(i,)] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=divisible)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    compiled = compile_kernel(source, target=TARGETS[arch], options=options)
    nvidia = arch.startswith("sm")
    text = compiled.asm["ptx" if nvidia else "amdgcn"]
    registers, stack, spills = _nvidia(compiled.asm["cubin"]) if nvidia else _amd(text)
    found = {"registers": registers, "stack": stack, "spills": spills, "shared": compiled.metadata.shared}
    for name in "wgmma.mma_async mma.sync tcgen05.mma v_mfma cp.async.cg atom tf32 xf32".split():
        found[name] = len(re.findall(name.replace(".", "[.]"), text))
    return found

print(json.dumps([compiled(*job) for job in json.loads(sys.argv[1])]))
"""
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TENSOR_CORES = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}


def assert_compile(jobs: list[tuple[str, str, bool, bool, int, bool]]) -> None:
    """Compiles variants (GPU, dtype, bias, soft-cap, H, aligned) in a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(jobs)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for job, found in zip(jobs, json.loads(result.stdout), strict=True):
        arch, dtype, *_, aligned = job
        print(job, found)
        assert found["stack"] == found["spills"] == 0, job
        assert found["shared"] <= SHARED[arch]
        assert found["atom"] == found["tf32"] == found["xf32"] == 0
        if dtype != "fp32":
            assert found[TENSOR_CORES[arch]] > 0
        if dtype != "fp32" and aligned and arch != "gfx942":
            assert found["cp.async.cg"] > 0  # 16 bytes at a time, past the registers


@pytest.mark.parametrize("arch", SHARED)
def test_compiles(arch: str) -> None:
    assert_compile([(arch, "bf16", False, False, 4096, True)])

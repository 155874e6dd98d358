"""Peak memory beyond the inputs, and the largest number of rows that fits."""

import ctypes
import gc
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.cases import Case, Inputs
from bench.contenders import CONTENDERS, Contender

SMALLEST, LARGEST = 256, 2**20  # rows that the search starts from, and stops at
PRECISION = 16  # the largest N is known to 1 / 16


@dataclass(frozen=True)
class Memory:
    """Peak bytes beyond the inputs, gradients included; on a GPU also the allocator's whole reservation."""

    extra: int
    reserved: int | None = None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, by PyTorch's error of a GPU or of a CPU, or Python's."""
    words = ("out of memory", "allocate memory", "memoryerror", "bad_alloc")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def release() -> None:
    """Gives what nobody holds back to a GPU."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def peak_on_gpu(contender: Contender, case: Case, inputs: Inputs) -> Memory:
    """One forward and backward from a fresh allocator state."""
    inputs.clear_gradients()
    release()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.function(inputs, case)
    torch.cuda.synchronize()
    memory = Memory(torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved())
    inputs.clear_gradients()
    return memory


def peak_on_cpu(contender: Contender, case: Case) -> Memory | None:
    """Peak resident memory of one forward and backward, in a process of its own.

    It counts what PyTorch's own temporaries and the matrix library take. None where the system does not tell
    (it needs Linux's /proc) or for a contender that is not of the list.
    """
    if not Path("/proc/self/clear_refs").exists() or contender not in CONTENDERS:
        return None
    result = _worker(contender, case, None)
    if result.returncode != 0:
        raise _error(result)
    return Memory(int(result.stdout.split()[-1]))


def _worker(contender: Contender, case: Case, limit: int | None) -> subprocess.CompletedProcess[str]:
    request = json.dumps({"name": contender.name, "case": case.as_dict(), "limit": limit})
    command = [sys.executable, "-m", "bench.memory", request]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def _error(result: subprocess.CompletedProcess[str]) -> RuntimeError:
    last = result.stderr.strip().split("\n")[-1]
    return RuntimeError(f"the process ended with code {result.returncode}: {last}")


def _work(request: str) -> int:
    asked = json.loads(request)
    case = Case(**asked["case"])
    (contender,) = (one for one in CONTENDERS if one.name == asked["name"])
    if asked["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (asked["limit"], asked["limit"]))
        contender.function(Inputs.of(case), case)
        return 0
    inputs = Inputs.of(case)
    # The first call loads libraries; a compiler also has to see the shape itself.
    contender.function(inputs if contender.compiles else inputs.first_rows(8), case)
    inputs.clear_gradients()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    contender.function(inputs, case)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", text)
    assert match is not None, f"/proc/self/status has no {field}"
    return int(match.group(1)) * 1024


def largest_rows(contender: Contender, case: Case, limit: int | None) -> int | None:
    """Largest N whose forward and backward fits the GPU, or `limit` bytes of a process on a CPU.

    None without a limit on a CPU. Known to 1 / 16, at most `LARGEST`.
    """
    if case.device == "cuda":
        return search(lambda rows: _fits_gpu(contender, replace(case, rows=rows)))
    if limit is None:
        return None
    return search(lambda rows: _fits_process(contender, replace(case, rows=rows), limit))


def search(fits: Callable[[int], bool]) -> int:
    """Largest number of rows that fits, by doubling, then bisecting; 0 if not even the smallest does."""
    low, high = 0, SMALLEST
    while high <= LARGEST and fits(high):
        low, high = high, 2 * high
    if low == 0 or high > LARGEST:
        return low
    while high - low > max(low // PRECISION, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits_gpu(contender: Contender, case: Case) -> bool:
    release()
    try:
        contender.function(Inputs.of(case), case)
        torch.cuda.synchronize()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _fits_process(contender: Contender, case: Case, limit: int) -> bool:
    result = _worker(contender, case, limit)
    # A library that cannot bear a failed allocation aborts: a negative code.
    if result.returncode > 0 and not is_out_of_memory(_error(result)):
        raise _error(result)
    return result.returncode == 0


if __name__ == "__main__":
    print(_work(sys.argv[1]))

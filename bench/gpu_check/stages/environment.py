"""What this machine is: device, driver, versions, clocks, and what is missing."""

import importlib.util
import os
import platform
import shutil
import subprocess
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

from bench.gpu_check.setting import Check, Setting, Skip

PACKAGES = ("triton", "rich", "matplotlib", "safetensors", "hypothesis")
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit,persistence_mode"


def checks(setting: Setting) -> list[Check]:
    """The lines of the environment."""
    packages = [Check(f"package {name}", partial(_package, name)) for name in PACKAGES]
    return [
        Check("device", partial(_device, setting)),
        Check("torch", _torch),
        Check("driver and clocks", partial(_clocks, setting)),
        Check("C compiler", _compiler),
        Check("commit", _commit),
        *packages,
    ]


def _device(setting: Setting) -> str:
    if setting.device == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} thread"
    found = torch.cuda.get_device_properties(0)
    return (
        f"{torch.cuda.device_count()} x {found.name}, sm_{found.major}{found.minor}, "
        f"{found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} SMs"
    )


def _torch() -> str:
    return f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def _clocks(setting: Setting) -> str:
    if setting.device == "cpu" or shutil.which("nvidia-smi") is None:
        raise Skip("no nvidia-smi")
    fields = f"driver_version,{CLOCKS}"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if result.returncode != 0:
        raise Skip(f"nvidia-smi: {(result.stdout + result.stderr).strip()[:200]}")
    pairs = zip(fields.split(","), result.stdout.split(","), strict=False)
    return ", ".join(f"{name} {value.strip()}" for name, value in pairs)


def _compiler() -> str:
    """Triton builds its launcher with one."""
    found = [os.environ.get("CC", ""), *(shutil.which(name) or "" for name in ("gcc", "cc", "clang"))]
    if not any(found):
        raise Skip("none found: Triton and torch.compile may need one")
    return next(path for path in found if path)


def _commit() -> str:
    try:
        command = ["git", "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
        command = ["git", "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise Skip(f"git does not tell: {error}") from error
    return head + (f", {len(changed.splitlines())} files changed" if changed else "")


def _package(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        raise Skip(f"{name} is not installed")
    try:
        return version(name)
    except PackageNotFoundError:
        return "version unknown"

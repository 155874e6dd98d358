"""What the numbers were measured on."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

import opsd_kernels

PACKAGES = ("triton", "liger-kernel", "trl", "fla-core")


def describe(device: str) -> dict[str, str]:
    """Device, versions, clocks and settings, by name."""
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opsd_kernels": opsd_kernels.__version__,
        "commit": commit(),
        "tf32": str(torch.backends.cuda.matmul.allow_tf32),
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    if device == "cuda":
        facts["cuda"] = str(torch.version.cuda or torch.version.hip)
        facts |= clocks()
    return facts


def line(facts: dict[str, str]) -> str:
    """The facts in one line."""
    device, *rest = facts.items()
    return ", ".join([device[1], *(f"{name} {value}" for name, value in rest)])


def slug(device: str) -> str:
    """The device's name for a folder."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu {_processor()}"
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def commit() -> str:
    """Short hash of the checkout, marked if it had changes; "unknown" outside one."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return result.stdout.strip() or "unknown"


def clocks() -> dict[str, str]:
    """Driver, and the GPU's clocks, power and temperature right now, as nvidia-smi tells them; else empty."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    uuid = getattr(torch.cuda.get_device_properties(), "uuid", None)
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields.split(","), (cell.strip() for cell in output.split(",")), strict=True))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for text in info.read_text().splitlines():
            if text.startswith("model name"):
                return text.split(":")[1].strip()
    return platform.processor() or platform.machine()

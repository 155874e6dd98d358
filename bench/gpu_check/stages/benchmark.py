"""The benchmark of the goals, in a process of its own, with the time that is left as its limit."""

import subprocess
import sys
from functools import partial

from bench.gpu_check.setting import Check, Setting, Skip


def checks(setting: Setting) -> list[Check]:
    """One line: the exit status and where the tables are."""
    return [Check("python -m bench --preset check", partial(_run, setting), limit=setting.left + 60)]


def _run(setting: Setting) -> str:
    folder = setting.out / "bench"
    # Without what takes longest: torch.compile and TRL's fp32 products.
    contenders = ("bare", "eager", "opsd_kernels", "Liger", "fla")
    asked = ("--preset", "check", "--objectives", "opsd", "--contenders", *contenders)
    command = [sys.executable, "-m", "bench", *asked, "--out", str(folder)]
    seconds = setting.left - 2
    log = setting.out / "bench.txt"
    with log.open("wb") as out:
        try:
            status = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise Skip(f"killed after {seconds:.0f} s; what it wrote: {_tables(setting)}") from error
    text = log.read_text(errors="replace")
    if "No module named" in text and status != 0:
        raise Skip(text.strip().splitlines()[-1])
    assert status == 0, f"exit status {status}: {' '.join(text.split())[-200:]} (tables: {_tables(setting)})"
    return f"exit status 0, tables: {_tables(setting)}"


def _tables(setting: Setting) -> str:
    found = sorted(x for x in (setting.out / "bench").rglob("*") if x.is_file())
    return ", ".join(str(x.relative_to(setting.out)) for x in found) or "none"

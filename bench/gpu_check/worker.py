"""Runs the checks of one stage in a process of its own and reports each through a pipe, as a JSON line.

The process may die of a bad memory access; the supervisor then starts another one behind the check that
killed it. A CUDA context that an error has broken ends the process too, since nothing after it could pass.
"""

import argparse
import importlib
import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check import faults
from bench.gpu_check.report import FAIL, PASS, SKIP
from bench.gpu_check.setting import Check, Setting, Skip, is_refusal

SPOILED = 70
NO_DEVICE = 2


class Pipe:
    """Events to the supervisor."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w")

    def send(self, **event: Any) -> None:
        """One JSON line."""
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()


def judge(check: Check) -> tuple[str, str]:
    """Verdict and numbers of a check; whatever it raises becomes a verdict."""
    try:
        numbers = check.run()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return PASS, numbers
    except Skip as reason:
        return SKIP, str(reason)
    except Exception as error:
        if is_refusal(error):
            return SKIP, str(error)
        traceback.print_exc()
        text = " ".join(str(error).split())[:300]
        return FAIL, text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}"


def context_lost() -> bool:
    """Whether the GPU refuses everything since an earlier error."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:
        return True
    return False


def mine(checks: list[Check], shard: int, shards: int) -> list[Check]:
    """The checks of this process: whole groups, dealt out in turn."""
    groups = list(dict.fromkeys(check.group or check.what for check in checks))
    return [check for check in checks if groups.index(check.group or check.what) % shards == shard]


def work(pipe: Pipe, module: str, setting: Setting, shard: int, shards: int, done: int) -> int:
    """Runs the shard's checks from number `done` on; returns the exit status."""
    checks = mine(importlib.import_module(module).checks(setting), shard, shards)
    for number, check in enumerate(checks[done:], start=done):
        if setting.left <= 0:
            rest = len(checks) - number
            pipe.send(event="start", number=number, what="the rest", limit=60)
            numbers = f"{rest} checks not run, from {check.what!r} on: the stage's time is spent"
            pipe.send(event="verdict", verdict=SKIP, numbers=numbers, seconds=0.0)
            break
        pipe.send(event="start", number=number, what=check.what, limit=check.limit)
        start = time.monotonic()
        verdict, numbers = judge(check)
        seconds = time.monotonic() - start
        lost = verdict == FAIL and context_lost()
        numbers += " (the CUDA context was lost)" if lost else ""
        pipe.send(event="verdict", verdict=verdict, numbers=numbers, seconds=seconds)
        if lost or (verdict == FAIL and check.spoils):
            return SPOILED
    return 0


def main() -> int:
    """Reads what the supervisor asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--module", required=True, help="of the stage")
    parser.add_argument("--device", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True, help="time.monotonic() of the system")
    parser.add_argument("--pipe", type=int, required=True)
    parser.add_argument("--shard", type=int, required=True)
    parser.add_argument("--shards", type=int, required=True)
    parser.add_argument("--done", type=int, required=True)
    parser.add_argument("--self-test", action="store_true")
    asked = parser.parse_args()
    pipe = Pipe(asked.pipe)
    if asked.device == "cuda" and not torch.cuda.is_available():
        pipe.send(event="no device")
        return NO_DEVICE
    if asked.device == "cpu":
        torch.set_num_threads(1)
    if asked.self_test:
        faults.install()
    setting = Setting(asked.device, asked.out, asked.deadline, asked.self_test)
    status = work(pipe, asked.module, setting, asked.shard, asked.shards, asked.done)
    pipe.send(event="end")
    return status


if __name__ == "__main__":
    # os._exit: a lost context or a dead graph may hang or crash the interpreter's own clean-up.
    status = main()
    os._exit(status)

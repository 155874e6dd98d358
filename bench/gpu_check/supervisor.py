"""Starts the stages' processes, divides the time among them, and writes down what they find.

Imports neither torch nor the engine, so that nothing they do can take the report along.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_check.report import FAIL, SKIP, Report, Verdict

GRACE = 3.0  # seconds over its time that a stage gets before it is killed
FINISH = 3.0  # seconds kept back for the end of the run
LEAST = 40.0  # seconds that any stage may take, whatever its share: importing torch can take half of them


@dataclass(frozen=True)
class Stage:
    """A module with a function `checks`.

    Args:
        name: of the module.
        share: of the time, relative to the other stages'; what one leaves over goes to those behind it.
        processes: how many run beside each other at most; on a GPU mostly to compile kernels.
        cpu: why it cannot run without a GPU; empty if it can.
        package: where the module is.
    """

    name: str
    share: float
    processes: int = 1
    cpu: str = ""
    package: str = "bench.gpu_check.stages"


NEEDS_GPU = "needs a CUDA device"
STAGES = (
    Stage("environment", 1),
    Stage("conformance", 24, processes=6),
    Stage("large", 5, cpu=f"{NEEDS_GPU}: tensors of more than 2^31 elements"),
    Stage("repeat", 7, processes=3),
    Stage("capture", 4, cpu=f"{NEEDS_GPU}: CUDA graphs"),
    Stage("sync", 3, cpu=f"{NEEDS_GPU}: set_sync_debug_mode"),
    Stage("compiled", 9, processes=3),
    Stage("autocast", 2),
    Stage("sanitizer", 10, processes=3, cpu=f"{NEEDS_GPU}: compute-sanitizer"),
    Stage("fuzz", 8, processes=3),
    Stage("benchmark", 27, cpu=f"{NEEDS_GPU}: the goals are a GPU's"),
)


class NoDevice(Exception):
    """There is no CUDA device."""


@dataclass(frozen=True)
class Plan:
    """What was asked for: the device, the folder, the stages, seconds in all, and whether to plant faults."""

    device: str
    out: Path
    stages: tuple[Stage, ...]
    seconds: float
    self_test: bool = False


@dataclass
class Worker:
    """A process that runs a shard of a stage, and what it is at."""

    shard: int
    done: int = 0
    what: str = "start"
    limit: float = 120.0
    since: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] | None = None

    def start(self, plan: Plan, stage: Stage, shards: int, deadline: float, events: queue.Queue[Any]) -> None:
        """Starts the process behind the checks that are done; its events go to the queue."""
        read, write = os.pipe()
        command = [
            sys.executable,
            "-m",
            "bench.gpu_check.worker",
            "--module",
            f"{stage.package}.{stage.name}",
        ]
        command += ["--device", plan.device, "--out", str(plan.out), "--deadline", str(deadline)]
        command += ["--pipe", str(write), "--shard", str(self.shard), "--shards", str(shards)]
        command += ["--done", str(self.done), *(["--self-test"] if plan.self_test else [])]
        with (plan.out / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=_environment(plan.device),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(write,),
                start_new_session=True,
            )
        os.close(write)
        self.what, self.limit, self.since = "start", 120.0, time.monotonic()
        threading.Thread(target=_forward, args=(self, self.process, read, events), daemon=True).start()

    def kill(self) -> None:
        """Ends the process and what it started."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def running(self) -> float:
        """Seconds since the check in flight began."""
        return time.monotonic() - self.since


def _forward(worker: Worker, process: subprocess.Popen[bytes], read: int, events: queue.Queue[Any]) -> None:
    with os.fdopen(read, "rb") as pipe:
        for line in pipe:
            events.put((worker, process, json.loads(line)))
    events.put((worker, process, {"event": "closed"}))


def _ended(process: subprocess.Popen[bytes]) -> int:
    """Exit status of a process, after the end of whatever it has left running in its group."""
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # not reaped: its number stays its own
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _environment(device: str) -> dict[str, str]:
    """Triton reads its interpreter's switch when it is imported; on a GPU the compiler is what is checked."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return {**environment, "TRITON_INTERPRET": "1"} if device == "cpu" else environment


def run(plan: Plan, report: Report) -> None:
    """All stages of the plan, in order."""
    deadline = time.monotonic() + plan.seconds - FINISH
    shares = [0.0 if plan.device == "cpu" and stage.cpu else stage.share for stage in plan.stages]
    for index, stage in enumerate(plan.stages):
        left = deadline - time.monotonic()
        if not shares[index]:
            report.add(Verdict(stage.name, "stage", SKIP, stage.cpu, 0.0))
        elif left < GRACE:
            report.add(Verdict(stage.name, "stage", SKIP, "the run's time is spent", 0.0))
        else:
            seconds = max(left * shares[index] / sum(shares[index:]), min(left, LEAST))
            _StageRun(plan, stage, report, seconds).run()


class _StageRun:
    """One stage: its processes, until all have finished or its time is spent."""

    def __init__(self, plan: Plan, stage: Stage, report: Report, seconds: float) -> None:
        self.plan, self.stage, self.report = plan, stage, report
        self.deadline = time.monotonic() + seconds
        self.events: queue.Queue[Any] = queue.Queue()
        most = 2 if plan.device == "cpu" else max(1, len(os.sched_getaffinity(0)) // 2)
        shards = min(stage.processes, most)
        self.workers = [Worker(shard) for shard in range(shards)]

    def run(self) -> None:
        """Handles events until no process is left."""
        try:
            for worker in self.workers:
                self._start(worker)
            active = set(range(len(self.workers)))
            while active:
                with contextlib.suppress(queue.Empty):
                    worker, process, event = self.events.get(timeout=0.2)
                    if process is worker.process and not self._handle(worker, event):
                        active.discard(worker.shard)
                for shard in list(active):
                    if self._overdue(self.workers[shard]):
                        active.discard(shard)
        finally:
            for worker in self.workers:
                worker.kill()

    def _start(self, worker: Worker) -> None:
        worker.start(self.plan, self.stage, len(self.workers), self.deadline, self.events)

    def _handle(self, worker: Worker, event: dict[str, Any]) -> bool:
        """Takes note of an event; whether the worker goes on."""
        kind = event.pop("event")
        if kind == "no device":
            raise NoDevice
        if kind == "start":
            worker.what, worker.limit, worker.since = event["what"], event["limit"], time.monotonic()
        if kind == "verdict":
            self.report.add(Verdict(self.stage.name, worker.what, **event))
            worker.what, worker.done, worker.limit = "", worker.done + 1, 120.0
            worker.since = time.monotonic()
        if kind == "end":
            worker.what = "end"
        if kind == "closed":
            return self._closed(worker)
        return True

    def _closed(self, worker: Worker) -> bool:
        """The process is gone: finished, or dead, in which case another one goes on behind its last check."""
        assert worker.process is not None
        status = _ended(worker.process)
        if worker.what == "end" and status == 0:
            return False
        if worker.what == "start":
            self._fail(worker, f"the process ended with status {status} before its first check: see log.txt")
            return False
        if worker.what not in ("", "end"):
            self._fail(worker, f"the process died with status {status}: see log.txt")
            worker.done += 1
        if time.monotonic() > self.deadline:
            return False
        self._start(worker)
        return True

    def _overdue(self, worker: Worker) -> bool:
        """Kills a check that hangs, or a stage that is out of time; whether the worker is done for."""
        hung, late = worker.running > worker.limit, time.monotonic() > self.deadline + GRACE
        if not hung and not late:
            return False
        worker.kill()
        if hung:
            self._fail(worker, f"no result after {worker.running:.0f} s: killed")
        elif worker.what not in ("", "end"):
            numbers = f"killed after {worker.running:.0f} s: the stage's time is spent"
            self.report.add(Verdict(self.stage.name, worker.what, SKIP, numbers, worker.running))
        if late or worker.what in ("start", "", "end"):
            return True
        worker.done += 1
        self._start(worker)
        return False

    def _fail(self, worker: Worker, numbers: str) -> None:
        self.report.add(Verdict(self.stage.name, worker.what, FAIL, numbers, worker.running))

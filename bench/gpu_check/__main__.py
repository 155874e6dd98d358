"""`python -m bench.gpu_check --out DIR`: every check that needs a GPU, in a given number of minutes.

Prints a verdict per line (PASS, FAIL, SKIP, what, numbers, seconds) and appends it to DIR/report.jsonl and
DIR/report.md at once; DIR/log.txt has the tracebacks. Exits with 1 if anything is wrong, 2 without a device,
128 + the signal's number if stopped.
"""

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu_check.report import Report
from bench.gpu_check.supervisor import STAGES, NoDevice, Plan, run


class Stopped(BaseException):
    """A signal asked for the end."""

    def __init__(self, number: int) -> None:
        self.number = number


def main() -> int:
    """Parses the command line and runs the stages."""
    plan = _plan()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stop)
    report, start = Report(plan.out), time.monotonic()
    (plan.out / "log.txt").write_bytes(b"")
    status, how = 0, "finished"
    try:
        run(plan, report)
    except Stopped as stopped:
        status, how = 128 + stopped.number, f"stopped by {signal.Signals(stopped.number).name}"
    except NoDevice:
        status, how = 2, "no CUDA device here (--device cpu runs what a CPU can check)"
    report.end(how, time.monotonic() - start)
    return status or int(report.failed)


def _plan() -> Plan:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (default 9)")
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="all by default")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: small sizes")
    parser.add_argument("--self-test", action="store_true", help="plants faults: the checks must fail")
    asked = parser.parse_args()
    stages = tuple(stage for stage in STAGES if stage.name in asked.stages)
    return Plan(asked.device, asked.out.resolve(), stages, 60 * asked.minutes, asked.self_test)


def _stop(number: int, frame: Any) -> None:
    raise Stopped(number)


if __name__ == "__main__":
    sys.exit(main())

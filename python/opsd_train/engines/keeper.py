"""Runs a command for as long as whoever started this lives: `python keeper.py COMMAND...`.

Whoever it is holds the other end of standard input, and keeps it open. When it is closed, which the kernel
does whatever way a process ends, the command and all that it started are ended, gently for `GRACE` seconds.
Nothing beside the standard library is imported, so that this process stays small.
"""

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress

GRACE = 10.0  # seconds from SIGTERM to SIGKILL


def main(command: list[str]) -> int:
    """The exit code of the command."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # a Ctrl-C is for whoever started this, who then goes
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_listen)
    while child.poll() is None:
        ready, _, _ = select.select([0], [], [], 0.5)
        if ready and not os.read(0, 1):
            break
    _end(child)
    return child.returncode


def _listen() -> None:
    """In the command, signals do again what they do by default."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the whole group of processes; it may outlive the command itself."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

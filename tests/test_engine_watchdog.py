"""A call that makes no progress ends in an error, or ends the process; never in a wait without end."""

import contextlib
import ctypes
import os
import signal
import socket  # noqa: F401
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from opsd_train.engines.base import EngineError
from opsd_train.engines.watchdog import EXIT_CODE, RAISE, Watchdog

HANG = {
    "python": "while True: pass",
    "sleep": "time.sleep(60)",
    "lock": "(lock := threading.Lock()).acquire() and lock.acquire()",
    "socket": "(pair := socket.socketpair())[0].recv(1)",
    "join": "threading.Thread(target=time.sleep, args=(60,), daemon=True).start() or "
    "[t for t in threading.enumerate() if t.daemon][0].join()",
}


def forked(body: Callable[[], None], tmp_path: Path) -> tuple[int, str]:
    """Exit code and stderr of a child process that runs `body`."""
    errors = tmp_path / "stderr"
    child = os.fork()
    if child == 0:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        body()
        os._exit(0)
    began = time.monotonic()
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() - began > 20:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1]), errors.read_text()


@pytest.mark.parametrize("kind", list(HANG))
def test_a_hang_is_an_error_where_the_main_thread_is(kind: str) -> None:
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"no progress for 0\.3 s while hanging"):  # noqa: SIM117
        with Watchdog(0.3, grace=5).watching("hanging"):
            exec(HANG[kind])
    assert 0.3 <= time.monotonic() - began < 10


def test_beats_keep_a_long_call_alive_and_the_signal_is_given_back() -> None:
    before = signal.getsignal(RAISE)
    with Watchdog(1.5, grace=5).watching("working") as beat:
        for _ in range(10):
            time.sleep(0.2)
            beat()
    assert signal.getsignal(RAISE) is before
    assert not [thread for thread in threading.enumerate() if thread.name == "opsd-watchdog"]


def test_an_error_of_the_call_is_the_callers() -> None:
    with pytest.raises(KeyError, match="weights"), Watchdog(5).watching("failing"):
        raise KeyError("weights")


def test_an_error_that_is_swallowed_is_raised_at_the_end() -> None:
    watching = Watchdog(0.2, grace=5).watching("swallowing")
    with pytest.raises(EngineError, match="no progress"), watching, contextlib.suppress(EngineError):
        time.sleep(10)


def test_another_time_can_be_given_for_a_call() -> None:
    with Watchdog(0.1, grace=5).watching("starting", seconds=5):
        time.sleep(0.4)


def block() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {RAISE})  # like native code that does not return
    time.sleep(60)


def ignore() -> None:
    signal.signal(RAISE, signal.SIG_IGN)
    threading.Event().wait()


def swallow() -> None:
    while True:
        with contextlib.suppress(EngineError):
            time.sleep(60)


@pytest.mark.parametrize("unreachable", [block, ignore, swallow])
def test_a_process_that_cannot_be_reached_is_left_without_orphans(
    unreachable: Callable[[], None], tmp_path: Path
) -> None:
    def body() -> None:
        child = subprocess.Popen(["sleep", "90"])
        (tmp_path / "child").write_text(str(child.pid))
        with Watchdog(0.5, grace=0.3).watching("writing step 3"):
            unreachable()

    code, error = forked(body, tmp_path)
    assert code == EXIT_CODE
    assert "no progress for 0.5 s while writing step 3" in error
    assert f"in {unreachable.__name__}" in error  # where the main thread was
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_call_in_another_thread_ends_the_process(tmp_path: Path) -> None:
    def call() -> None:
        with Watchdog(0.3, grace=0.3).watching("writing elsewhere"):
            time.sleep(60)

    def body() -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    code, error = forked(body, tmp_path)
    assert code == EXIT_CODE
    assert "while writing elsewhere" in error


def test_native_code_that_keeps_every_thread_from_running_ends_the_process(tmp_path: Path) -> None:
    def body() -> None:
        with Watchdog(0.5, grace=0.3).watching("computing"):
            ctypes.PyDLL(None).sleep(60)  # a PyDLL keeps the interpreter's lock

    code, error = forked(body, tmp_path)
    assert code == 1
    assert "Timeout" in error

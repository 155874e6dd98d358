"""A call to an engine that makes no progress ends in an error, or ends the run; it never stalls it."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

from opsd_train.engines.base import EngineError

EXIT_CODE = 70  # "internal software error", of sysexits.h
GRACE = 3.0  # seconds an error has to reach Python in before the process is left
POLL = 1.0  # seconds between two looks

RAISE = signal.SIGUSR2  # wakes the main thread from what waits in C

Beat = Callable[[], None]


class Watchdog:
    """Watches calls from a thread of its own.

    A call that has not beaten for its seconds gets an `EngineError`, raised where the main thread is: a
    signal wakes it from a sleep, a lock or a socket. If it cannot be raised within the grace (native code
    that does not return, signals blocked, a caller that is not the main thread), there is nobody left to
    clean up: the message and every thread's stack go to stderr, child processes are killed, and the process
    leaves with `EXIT_CODE`. Native code that keeps even this thread from running is left by `faulthandler`,
    with 1.

    Args:
        seconds: a call may go without a beat.
        grace: seconds between the error and leaving.
    """

    def __init__(self, seconds: float, grace: float = GRACE) -> None:
        self.seconds, self.grace = seconds, grace

    @contextmanager
    def watching(self, what: str, seconds: float | None = None) -> Iterator[Beat]:
        """Watch what happens inside; the function it yields is to be called at every sign of progress.

        Args:
            what: is happening, for the message.
            seconds: without a beat, in place of the watchdog's own.

        Raises:
            EngineError: there was none for too long.
        """
        watch = _Watch(what, self.seconds if seconds is None else seconds, self.grace)
        with _raising(watch):
            watch.start()
            try:
                yield watch.beat
            finally:
                try:
                    watch.end()
                except EngineError:  # raised at this very moment, and not again
                    watch.end()
        if watch.stalled:  # the error came too late, or was swallowed on its way here
            raise watch.error()


class _Watch:
    """One call under watch."""

    def __init__(self, what: str, seconds: float, grace: float) -> None:
        self.what, self.seconds, self.grace = what, seconds, grace
        self.stalled = self.ended = self.can_raise = False
        self.last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="opsd-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def beat(self) -> None:
        self.last = time.monotonic()

    def end(self) -> None:
        self.ended = True
        self._over.set()
        self._thread.join()

    def error(self) -> EngineError:
        return EngineError(
            f"rollouts: the engine made no progress for {self.seconds:g} s while {self.what}; it hangs, or "
            "is slower than rollout_stall_seconds allows (rollout_start_seconds while it starts)"
        )

    def _watch(self) -> None:
        while not self.stalled:
            _leave_after(self.seconds + 2 * self.grace + POLL)
            if self._over.wait(min(POLL, max(self.last + self.seconds - time.monotonic(), 0.0))):
                break
            self.stalled = time.monotonic() - self.last >= self.seconds
        if self.stalled:
            main = threading.main_thread().ident
            if self.can_raise and main is not None:
                signal.pthread_kill(main, RAISE)
            if not self._over.wait(self.grace):
                leave(str(self.error()))
        faulthandler.cancel_dump_traceback_later()


def leave(message: str) -> None:
    """Leave the process at once: the message, where every thread is, no child process left behind."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{message}\n".encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
    end_processes(psutil.Process().children(recursive=True))
    os._exit(EXIT_CODE)


def end_processes(processes: list[psutil.Process], seconds: float = 5.0) -> None:
    """Kill processes and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=seconds)


def _leave_after(seconds: float) -> None:
    """Have a thread that needs no interpreter leave the process, unless it is told again before."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stderr that is no file
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)


@contextmanager
def _raising(watch: _Watch) -> Iterator[None]:
    """The signal of the watchdog raises its error in here, if this is the main thread."""

    def handle(number: int, frame: FrameType | None) -> None:
        if watch.stalled and not watch.ended:
            raise watch.error()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(RAISE, handle)
    watch.can_raise = True
    try:
        yield
    finally:
        signal.signal(RAISE, signal.SIG_DFL if before is None else before)

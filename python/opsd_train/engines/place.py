"""The folder in which a run hands its weights over; what runs that were killed left in theirs is removed."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FOLDER = "vllm-sync"  # in the run folder
LOCK = "lock"


@contextmanager
def place_of(run: str, shared: Path) -> Iterator[Path]:
    """`shared/run`, removed at the end, and `shared` with it if nothing else is in it.

    It is locked for as long as the process lives, however it ends. So folders of other runs that nobody holds
    are those of dead ones, and are removed first: each may hold all weights. Where files cannot be locked,
    they stay.

    Args:
        run: a name that no other run has.
        shared: where several runs may have theirs.
    """
    _sweep(shared)
    own, hidden = shared / run, shared / f".{run}"
    hidden.mkdir(parents=True)
    try:
        with (hidden / LOCK).open("w") as lock:
            _hold(lock.fileno())
            hidden.rename(own)  # locked before anyone can see it
            yield own
    finally:
        for one in (own, hidden):
            shutil.rmtree(one, ignore_errors=True)
        with suppress(OSError):
            shared.rmdir()


def _sweep(shared: Path) -> None:
    for path in shared.glob(f"[!.]*/{LOCK}"):
        with suppress(OSError), path.open("r+") as lock:
            if _hold(lock.fileno()):
                shutil.rmtree(path.parent)


def _hold(file: int) -> bool:
    """Whether the file is locked by this process now, until it closes it or ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

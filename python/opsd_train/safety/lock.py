"""One run in a folder at a time: a lock that the system takes back when the process dies, however it dies."""

import fcntl
import os
import socket
from io import TextIOWrapper
from pathlib import Path
from typing import Self

LOCK = ".running"


class FolderLock:
    """Held by the first process of a run from its look at the folder to its end.

    The lock is the system's, on a small file in the folder that says who holds it; a file without a process
    locks nothing. Within one process a folder can be locked again, since it is one run that does so.

    Args:
        folder: of the run; it is made.

    Raises:
        ValueError: another process holds it, or the folder cannot be made or written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / LOCK
        self._made = not self.path.parent.exists()
        self._file: TextIOWrapper | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while self._file is None:
                self._file = self._locked()
        except OSError as error:
            raise ValueError(f"out: expected a folder to write to, got {folder}: {error.strerror}") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def _locked(self) -> TextIOWrapper | None:
        """The file, locked; None if its last holder has deleted it in between."""
        file = self.path.open("a+", encoding="utf-8")
        try:
            # Not flock: that one would pass to children that are forked, and outlive the run in them.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.path.exists() and self.path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"out: a run is going on in {self.path.parent} ({holder}); wait for its end, or choose "
                "another folder"
            ) from None
        file.close()
        return None

    def release(self) -> None:
        """Give the folder back; an empty one that was made for the lock goes too."""
        if self._file is None or self._file.closed:
            return
        self.path.unlink(missing_ok=True)
        self._file.close()
        if self._made and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

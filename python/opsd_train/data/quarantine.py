"""Rows that cannot be used: the first one stops a run, unless so many of them may be set aside."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from opsd_train.json_files import write_atomically

BAD_ROWS = "bad_rows.jsonl"
# What is told of a bad row: what is wrong with it, where it is, and the row as it was.
Refuse: TypeAlias = Callable[[str, str, Any], None]


def stop(reason: str, where: str, raw: Any) -> None:
    """The default for a bad row: ValueError with the reason."""
    raise ValueError(reason)


class Quarantine:
    """Sets bad rows aside in `bad_rows.jsonl`, up to a limit; an instance is a `Refuse`.

    The file has one JSON object per row: `where`, `reason`, and `row` as it was, a line that is not JSON as
    text. Bytes that are not UTF-8 are lone surrogates in it: `row.encode("utf-8", "surrogateescape")` gives
    them back.

    Args:
        folder: of the run; made when the first row is set aside.
        limit: rows that may be set aside; the next one raises ValueError.
        resumes: whether the rows that the file holds already are those of this run, and stay in it.
        writes: whether this process writes the file; one of several does.
    """

    def __init__(
        self, folder: str | Path | None, limit: int, resumes: bool = False, writes: bool = True
    ) -> None:
        if limit < 0:
            raise ValueError(f"skip_bad_rows: expected a number of at least 0, got {limit}")
        self.path, self.limit, self.writes = Path(folder or ".") / BAD_ROWS, limit, writes
        self.entries: list[dict[str, Any]] = []
        if writes and not resumes:
            self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.entries)

    def __call__(self, reason: str, where: str, raw: Any) -> None:
        """Set a row aside; ValueError for one too many."""
        if self.limit == 0:
            stop(reason, where, raw)
        self.entries.append({"where": where, "reason": reason, "row": raw})
        self._write()
        if len(self.entries) > self.limit:
            raise ValueError(
                f"skip_bad_rows: expected at most {self.limit} bad rows, found one more: {reason} (all are "
                f"in {self.path})"
            )

    def _write(self) -> None:
        if not self.writes:
            return
        lines = [_line(entry) for entry in self.entries]
        earlier = [line for line in _lines(self.path) if line not in lines]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, "".join(line + "\n" for line in [*earlier, *lines]))


def count(folder: str | Path | None) -> int:
    """How many rows a run has set aside."""
    return len(_lines(Path(folder or ".") / BAD_ROWS))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="ascii").splitlines() if path.is_file() else []


def _line(entry: Mapping[str, Any]) -> str:
    """ASCII JSON, in which a lone surrogate survives; what JSON has no form for is written as its `str`."""
    return json.dumps(entry, default=str)

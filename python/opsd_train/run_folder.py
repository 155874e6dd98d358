"""The folders that commands write to: the names of a run's files, and what a command may do to a folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Literal

from opsd_train.data.quarantine import BAD_ROWS
from opsd_train.engines.place import FOLDER
from opsd_train.safety.lock import LOCK

METRICS, EVALUATIONS, ROLLOUTS, INFO = "metrics.jsonl", "evaluations.json", "rollouts.json", "run.json"
FILES = (METRICS, EVALUATIONS, ROLLOUTS, INFO)
MODEL = "model"
SERVER_LOG = "vllm-server.log"
LEFT = (BAD_ROWS, SERVER_LOG, FOLDER, LOCK)  # what a run may leave that ended before it began

Existing = Literal["error", "replace", "resume"]


def check_output(folder: str | Path | None, existing: Existing, command: str | None = None) -> None:
    """Raise ValueError for a folder that holds something else, or a run that is to be kept.

    With `existing` "replace", only a run that the same command made may be in it.
    """
    path = Path(folder or ".")
    check_folder(path)
    held = sorted(entry.name for entry in path.iterdir() if entry.name not in LEFT) if path.is_dir() else []
    is_run = any(name in held for name in FILES)
    if held and not is_run:
        raise ValueError(f"out: expected an empty folder or a run, but {path} holds {', '.join(held[:3])}")
    if is_run and existing == "error":
        raise ValueError(
            f"out: {path} holds a run; choose another folder, or go on with --resume-from-checkpoint last"
        )
    if is_run and existing == "replace" and (made := made_by(path)) != command:
        raise ValueError(
            f"out: expected an empty folder or an earlier run of `{command}`, which is replaced; {path} "
            f"holds one of {'another command' if made is None else f'`{made}`'}; choose another folder"
        )


def check_begun(folder: str | Path | None) -> None:
    """ValueError for a run that has ended without a checkpoint: gone on with, it would begin again."""
    path = Path(folder or ".")
    if (path / MODEL).exists():
        raise ValueError(
            f"resume_from_checkpoint: expected a checkpoint in {path}, found none, but the model of a run "
            "that has ended; choose another folder"
        )


def check_folder(path: Path) -> None:
    """ValueError unless a folder is there or can be made."""
    with of_output(path):
        for part in (path, *path.parents):
            if part.exists():
                if not part.is_dir():
                    raise ValueError(f"out: expected a folder, got the file {part}")
                return


@contextmanager
def of_output(path: Path) -> Iterator[None]:
    """Inside, what the system says of the output folder is a ValueError that names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"out: expected a folder to write to, got {path}: {error.strerror or error}"
        ) from None


def made_by(folder: Path) -> str | None:
    """The command that made the run in a folder, as run.json says; None if it does not."""
    try:
        found = json.loads((folder / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("command") if isinstance(found, dict) else None


def check_new(path: Path) -> None:
    """ValueError for a file that is there already, or in whose folder none can be."""
    check_folder(path.parent)
    if path.exists():
        raise ValueError(f"out: expected a file that is not there yet, got {path}; choose another name")


def of_its_own(folder: Path, names: tuple[str, ...]) -> Path:
    """The folder, or `folder-2`, `folder-3` and so on: the first that has no file of these names."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    if not any((folder / name).exists() for name in names):
        return folder
    return next(one for one in numbered if not any((one / name).exists() for name in names))

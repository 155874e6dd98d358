"""Folders that are there whole or not at all, whenever the process dies.

A folder is written under a temporary name beside its place. Then every file is synced to the disk, a marker
with the size and the SHA-256 of each is written last and synced with the folder, the folder is renamed, and
its parent is synced. So a folder under its own name is whole, and the marker proves it.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARKER = "complete.json"
TEMPORARY = "tmp-"


def temporary_of(path: Path) -> Path:
    """Where the folder that is to be `path` is written."""
    return path.with_name(TEMPORARY + path.name)


def begin(path: Path) -> Path:
    """Make the empty temporary folder of `path`; what an interrupted write left there is removed."""
    temporary = temporary_of(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def publish(path: Path, about: Mapping[str, Any]) -> None:
    """Sync and mark the temporary folder of `path`, and give it that name.

    A folder that is there already makes room. It is deleted if it holds nothing beside what its marker lists,
    and else kept under another name.

    Args:
        path: the folder's own name.
        about: what the marker says besides the files.
    """
    temporary = temporary_of(path)
    files = {str(one.relative_to(temporary)): _synced(one) for one in _files(temporary)}
    marker = temporary / MARKER
    with marker.open("w", encoding="utf-8") as file:
        json.dump({**about, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for folder in [one for one in temporary.rglob("*") if one.is_dir()]:
        _sync_folder(folder)
    _sync_folder(temporary)
    old = _make_room(path)
    os.rename(temporary, path)
    _sync_folder(path.parent)
    if old is not None:
        shutil.rmtree(old)


@contextmanager
def whole_folder(path: Path, about: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Write a folder into the one that this gives; at the end it is at `path`, after an error it is gone."""
    temporary = begin(path)
    try:
        yield temporary
        publish(path, about or {})
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What the marker says, None without a readable one."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else None


def what_is_wrong(folder: Path, digests: bool = False) -> str | None:
    """Why a folder is not whole, in words; None for one that is.

    Args:
        folder: to look at.
        digests: read every file and compare its SHA-256 too, not its size alone.
    """
    marker = read_marker(folder)
    if marker is None:
        return f"{MARKER} is missing or cut off"
    for name, told in marker["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != told["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {told['bytes']}"
        if digests and _digest(path) != told["sha256"]:
            return f"the content of {name} is not what was written"
    return None


def remove(folder: Path) -> None:
    """Delete a folder; under its own name it is there whole until it is gone."""
    doomed = temporary_of(folder)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def move(path: Path, to: Path) -> Path:
    """Rename a file or folder; where the name is taken, to one with a number. Returns where it is."""
    to.parent.mkdir(parents=True, exist_ok=True)
    number, free = 1, to
    while free.exists():
        number += 1
        free = to.with_name(f"{to.stem}.{number}{to.suffix}")
    os.rename(path, free)
    _sync_folder(path.parent)
    _sync_folder(to.parent)
    return free


def _files(folder: Path) -> list[Path]:
    return sorted(one for one in folder.rglob("*") if one.is_file())


def _synced(path: Path) -> dict[str, Any]:
    """Sync a file; its size and its digest."""
    with path.open("r+b") as file:
        found = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        os.fsync(file.fileno())
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle of a folder to sync
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_room(path: Path) -> Path | None:
    """Rename what is at `path`; returns it if it may be deleted."""
    if not path.exists():
        return None
    held = {str(one.relative_to(path)) for one in _files(path)} - {MARKER}
    if held <= (read_marker(path) or {"files": {}})["files"].keys():
        old = path.with_name(f"{TEMPORARY}{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
        return old
    number = 1
    while (kept := path.with_name(f"{path.name}.kept-{number}")).exists():
        number += 1
    os.rename(path, kept)
    warnings.warn(f"{path} held files that are not the driver's; it is kept as {kept}", stacklevel=3)
    return None

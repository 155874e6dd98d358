"""What is on the disk when: files are synced before a rename names them, nothing whole goes first."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opsd_train import json_files
from opsd_train.safety import checkpoints, folders
from opsd_train.watch import record
from opsd_train.watch.record import RunRecord

Calls = list[tuple[Any, ...]]


class Watched:
    """A stand-in for a module that notes some calls, and makes them.

    Args:
        module: what it stands for.
        seen: where calls go: ("fsync", path, bytes on their way to the disk), ("rename", from, to), ...
        names: of the functions that are noted.
    """

    def __init__(self, module: Any, seen: Calls, names: tuple[str, ...]) -> None:
        self.module, self.seen, self.names = module, seen, names

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.module, name)
        if name not in self.names:
            return real

        def noted(*arguments: Any, **named: Any) -> Any:
            if name == "fsync":
                handle = arguments[0]
                size = os.fstat(handle).st_size
                self.seen.append((name, os.readlink(f"/proc/self/fd/{handle}"), size))
            else:
                self.seen.append((name, *map(str, arguments)))
            return real(*arguments, **named)

        return noted


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """What the modules that write files ask of the system, in its order."""
    calls: Calls = []
    for module in (folders, json_files, record):
        monkeypatch.setattr(module, "os", Watched(os, calls, ("fsync", "rename", "replace")))
    for module in (folders, checkpoints):
        monkeypatch.setattr(module, "shutil", Watched(shutil, calls, ("rmtree",)))
    return calls


def written(out: Path, text: str = "weights") -> Path:
    path = out / "checkpoint-1"
    inner = folders.begin(path) / "inner"
    inner.mkdir()
    (inner / "deep").write_text(text)
    (inner.parent / "flat").write_text(text)
    return path


def test_a_folder_is_synced_file_by_file_before_it_has_its_name(tmp_path: Path, seen: Calls) -> None:
    path = written(tmp_path)
    temporary = tmp_path / "tmp-checkpoint-1"
    seen.clear()
    folders.publish(path, {"step": 1})
    size = (path / folders.MARKER).stat().st_size  # nothing of it is left in a buffer
    assert [call[:2] for call in seen] == [
        ("fsync", str(temporary / "flat")),
        ("fsync", str(temporary / "inner" / "deep")),
        ("fsync", str(temporary / folders.MARKER)),
        ("fsync", str(temporary / "inner")),
        ("fsync", str(temporary)),
        ("rename", str(temporary)),
        ("fsync", str(tmp_path)),
    ]
    assert seen[0][2] == seen[1][2] == len("weights")
    assert seen[2][2] == size
    assert seen[5][2] == str(path)


def test_what_was_there_goes_when_its_successor_is_on_the_disk(tmp_path: Path, seen: Calls) -> None:
    path = written(tmp_path, "old")
    folders.publish(path, {})
    written(tmp_path, "new")
    seen.clear()
    folders.publish(path, {})
    old = tmp_path / "tmp-checkpoint-1.old"
    assert seen[5:] == [
        ("rmtree", str(old)),  # of a write before, none here
        ("rename", str(path), str(old)),
        ("rename", str(tmp_path / "tmp-checkpoint-1"), str(path)),
        ("fsync", str(tmp_path), seen[-2][2]),
        ("rmtree", str(old)),
    ]
    assert (path / "flat").read_text() == "new"
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_a_folder_that_goes_loses_its_name_before_its_files(tmp_path: Path, seen: Calls) -> None:
    """Rotation in place would leave half a checkpoint under the name of a whole one."""
    for step in (1, 2, 3):
        folders.begin(tmp_path / f"checkpoint-{step}")
        folders.publish(tmp_path / f"checkpoint-{step}", {"step": step})
    seen.clear()
    checkpoints.rotate(tmp_path / "checkpoint-3", 2, None)
    doomed = str(tmp_path / "tmp-checkpoint-1")
    assert seen == [
        ("rmtree", doomed),  # what a deletion cut off may have left
        ("rename", str(tmp_path / "checkpoint-1"), doomed),
        ("rmtree", doomed),
    ]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-3"]


def test_a_move_is_synced_in_both_folders_and_takes_no_name_twice(tmp_path: Path, seen: Calls) -> None:
    for number, name in enumerate(("completions.jsonl", "completions.2.jsonl", "completions.3.jsonl")):
        source = tmp_path / f"source-{number}.jsonl"
        source.write_text(str(number))
        seen.clear()
        found = folders.move(source, tmp_path / "there" / "completions.jsonl")
        assert found == tmp_path / "there" / name
        assert found.read_text() == str(number)
        assert [call[:2] for call in seen] == [
            ("rename", str(source)),
            ("fsync", str(tmp_path)),
            ("fsync", str(tmp_path / "there")),
        ]


@pytest.mark.parametrize("whole", [True, False])
def test_a_sweep_keeps_the_only_whole_copy(tmp_path: Path, whole: bool) -> None:
    """A write that replaced a checkpoint was cut off between its two renames: the old one is all there is."""
    old = tmp_path / "tmp-checkpoint-1.old"
    for path in (tmp_path / "checkpoint-1", *([tmp_path / "checkpoint-2"] if whole else [])):
        folders.begin(path)
        folders.publish(path, {"step": 1})
    (tmp_path / "checkpoint-1").rename(old)
    (tmp_path / "tmp-checkpoint-1").mkdir()
    checkpoints.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == (["checkpoint-2"] if whole else [old.name])


def test_a_file_is_replaced_by_one_that_is_on_the_disk(tmp_path: Path, seen: Calls) -> None:
    path = tmp_path / "run.json"
    json_files.write_atomically(path, "{}")
    temporary = str(tmp_path / f".run.json.{os.getpid()}.tmp")
    assert seen == [("fsync", temporary, 2), ("replace", temporary, str(path))]
    with pytest.raises(TypeError), json_files.replacing(path) as file:
        file.write("no bytes")  # type: ignore[arg-type]
    assert path.read_text() == "{}"
    assert os.listdir(tmp_path) == ["run.json"]


def test_lines_of_the_record_are_on_the_disk_when_the_call_returns(tmp_path: Path, seen: Calls) -> None:
    written = RunRecord(tmp_path)
    metrics, superseded = tmp_path / record.METRICS, tmp_path / record.SUPERSEDED
    for step in (1, 2):
        written.log(step, {"loss": 1.0})
        assert seen[-1] == ("fsync", str(metrics), metrics.stat().st_size)
    seen.clear()
    written.rewind(1)
    assert json.loads(superseded.read_text())["metrics"]["step"] == 2
    assert seen[0] == ("fsync", str(superseded), superseded.stat().st_size)  # before the lines are dropped
    assert [call[0] for call in seen] == ["fsync", "fsync", "replace"]
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1]

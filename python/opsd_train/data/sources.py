"""Records of a data set, wherever it is: files, folders, the hub, generated problems."""

import csv
import glob
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl

from opsd_train.data import generated
from opsd_train.data.strict import RepeatedKey, loads, repeated_line
from opsd_train.hub import HUB_ID

FORMATS = (".jsonl", ".json", ".parquet", ".csv")
CARD = "dataset_infos.json"  # that of a data set in the hub's older layout
EXPECTED = f"a file that ends in {', '.join(FORMATS)}, a folder, a glob, a hub id or reasoning_gym:TASK"


@dataclass(frozen=True)
class Found:
    """One record and its place; or, with an `error`, what stood there instead.

    `raw` is the record as it was: a line of text where it could not be read as one.
    """

    where: str
    record: Mapping[str, Any]
    raw: Any
    error: str | None = None


@dataclass(frozen=True)
class Choice:
    """Which part of a data set is meant, where its name does not say it (`?split=test&revision=main`).

    Args:
        split: of a folder or a hub id.
        revision: of a hub id, the commit, tag or branch.
        size: problems to generate.
        seed: of generated problems.
    """

    split: str = "train"
    revision: str | None = None
    size: int = 500
    seed: int = 0


def records(source: str | Path | Iterable[Mapping[str, Any]], choice: Choice = Choice()) -> Iterator[Found]:
    """Every record of a data set in its order.

    Args:
        source: the path of a file or a folder, a glob, a hub id `name` or `name:configuration`,
            `reasoning_gym:TASK`, or the records themselves.
        choice: what the source's own `?name=value&...` does not say.

    Raises:
        ValueError: there is no such data set, or it cannot be read as a whole; a single record that cannot
            is a `Found` with an error.
    """
    if not isinstance(source, str | Path):
        for number, record in enumerate(source, start=1):
            yield Found(f"row {number}", record, record)
        return
    name = str(source)
    path, base = Path(name), name.partition("?")[0]
    if path.is_file():
        yield from _file(path)
    elif Path(base).is_dir():
        yield from _folder(Path(base), options(name, ("split",)).get("split", choice.split))
    elif name.startswith(generated.PREFIX):
        yield from (Found(where, one, one) for where, one in generated.records(problems(name, choice)))
    elif any(sign in base for sign in "*[") or path.suffix in FORMATS:
        yield from _glob(name)
    else:
        yield from _hub(name, choice)


def _file(path: Path) -> Iterator[Found]:
    if path.suffix not in READERS:
        raise ValueError(f"data: expected {EXPECTED}; got {path}")
    yield from READERS[path.suffix](path)


def _glob(pattern: str) -> Iterator[Found]:
    found = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
    if not found:
        raise ValueError(f"data: expected {EXPECTED}; got {pattern}, which does not exist")
    for name in found:
        yield from _file(Path(name))


def _folder(path: Path, split: str) -> Iterator[Found]:
    """A folder of `save_to_disk`, or of data files, which `datasets` sorts into splits by their names."""
    import datasets  # takes a second, which files of text need not wait for

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        try:
            held = datasets.load_from_disk(str(path))
        except Exception as error:  # pyarrow raises errors of its own
            _unreadable(path, error)
        if isinstance(held, datasets.DatasetDict):
            if split not in held:
                raise ValueError(f"data: expected split {split!r} in {path}, got {', '.join(held)}")
            held = held[split]
        yield from _table(held, str(path))
        return
    try:
        files = datasets.load_dataset_builder(str(path)).config.data_files or {}
    except (OSError, ValueError) as error:
        raise ValueError(f"data: expected data files in the folder {path}; {error}") from None
    names = {str(found): str(part) for part, group in files.items() for found in group}
    here = [one for one in sorted(path.rglob("*")) if one.suffix in FORMATS and one.name != CARD]
    hidden = [one for one in here if any(part[0] in "._" for part in one.relative_to(path).parts)]
    ignored = [str(one) for one in here if one not in hidden and str(one.resolve()) not in names]
    if ignored:
        raise ValueError(
            f"data: expected files of one format in {path}, got {next(iter(names))} and {ignored[0]}; name "
            "the file, or a glob"
        )
    chosen = sorted(found for found, part in names.items() if part == split)
    if not chosen:
        raise ValueError(f"data: expected split {split!r} in {path}, got {', '.join(map(str, files))}")
    for name in chosen:
        yield from _file(Path(name))


def _hub(name: str, choice: Choice) -> Iterator[Found]:
    """A data set of the hub; code that comes with one is never run."""
    import datasets

    base = name.partition("?")[0]
    repository, _, configuration = base.partition(":")
    if not HUB_ID.fullmatch(repository):
        raise ValueError(f"data: expected {EXPECTED}; got {name}, which does not exist")
    given = options(name, ("split", "revision"))
    split, revision = given.get("split", choice.split), given.get("revision", choice.revision)
    try:
        table = datasets.load_dataset(
            repository, configuration or None, split=split, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"data: expected {EXPECTED}; {name} is no file or folder here, and as a hub id (split {split}): "
            f"{error}"
        ) from error
    yield from _table(table, f"{base} [{split}]")


def problems(name: str, choice: Choice = Choice()) -> generated.Problems:
    """What `reasoning_gym:TASK?...` asks for."""
    task = name.partition("?")[0].removeprefix(generated.PREFIX)
    given = {"size": choice.size, "seed": choice.seed} | options(name)
    return generated.Problems.of(task, given)


def options(name: str, known: tuple[str, ...] | None = None) -> dict[str, str]:
    """What stands behind the `?` of a source; ValueError for what is none of the known names."""
    given = dict(parse_qsl(name.partition("?")[2], keep_blank_values=True))
    if known is None:
        return given
    for key in given:
        if key not in known:
            raise ValueError(f"data: expected options among {', '.join(known)} in {name!r}, got {key!r}")
    return given


def _table(table: Iterable[Mapping[str, Any]], name: str) -> Iterator[Found]:
    for number, record in enumerate(table, start=1):
        yield Found(f"{name} row {number}", record, record)


def _parquet(path: Path) -> Iterator[Found]:
    import datasets

    try:
        table = datasets.load_dataset(
            "parquet", data_files=glob.escape(str(path)), split="train", trust_remote_code=False
        )
    except Exception as error:  # pyarrow raises errors of its own
        _unreadable(path, error)
    yield from _table(table, str(path))


def _jsonl(path: Path) -> Iterator[Found]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parsed(line, f"{path} line {number}")


def _parsed(line: str, where: str) -> Found:
    text = line.rstrip("\r\n")
    if error := _not_utf8(text):
        return Found(where, {}, text, f"{where}: {error}")
    try:
        record = loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{where}: expected a JSON object, got {text.strip()[:60]!r}: {error}"
        return Found(where, {}, text, reason)
    return _object(record, where, text)


def _object(record: Any, where: str, raw: Any) -> Found:
    if not isinstance(record, dict):
        return Found(where, {}, raw, f"{where}: expected a JSON object, got a {type(record).__name__}")
    return Found(where, record, record)


def _json(path: Path) -> Iterator[Found]:
    """One list of objects. Lines of objects under this name are read like `.jsonl`."""
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not raw.lstrip().startswith(b"["):
        yield from _jsonl(path)
        return
    try:
        held = loads(text := raw.decode("utf-8"))
    except RepeatedKey as error:
        raise ValueError(f"{path} line {repeated_line(text)}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON list of objects; {error}") from None
    for number, record in enumerate(held, start=1):
        yield _object(record, f"{path} row {number}", record)


def _csv(path: Path) -> Iterator[Found]:
    """Cells are text, and empty ones are missing; the first line names the columns."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        read: list[str] = []
        reader = csv.reader(_remembered(file, read), strict=True)
        header = next(reader, [])
        if not all(name.strip() for name in header) or len(set(header)) < len(header):
            raise ValueError(f"{path} line 1: expected different names of columns, got {header}")
        while True:
            read.clear()
            where = f"{path} line {reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                reason = f"{where}: expected comma-separated values; {error}"
                yield Found(where, {}, "".join(read), reason)
                continue
            if cells:
                yield _cells(header, cells, "".join(read), where)


def _remembered(lines: Iterable[str], read: list[str]) -> Iterator[str]:
    """The lines, noting which have been read."""
    for line in lines:
        read.append(line)
        yield line


def _cells(header: list[str], cells: list[str], raw: str, where: str) -> Found:
    if len(cells) != len(header):
        return Found(where, {}, raw, f"{where}: expected {len(header)} cells, got {len(cells)}")
    record = {name: cell or None for name, cell in zip(header, cells, strict=True)}
    error = _not_utf8("".join(cells))
    return Found(where, {}, raw, f"{where}: {error}") if error else Found(where, record, record)


def _not_utf8(text: str) -> str | None:
    """What is wrong with text in which a byte that is no UTF-8 is a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = text[error.start].encode("utf-8", "surrogateescape").hex()
        return f"expected UTF-8, got the byte 0x{byte}"
    return None


def _unreadable(path: Path, error: Exception) -> NoReturn:
    raise ValueError(f"data: expected readable data at {path}; {type(error).__name__}: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}

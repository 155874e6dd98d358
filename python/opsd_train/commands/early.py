"""What is found to be wrong before packages are imported that take seconds: options, paths, rows."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from opsd_train.commands import option_names
from opsd_train.commands.words import held, joined, layers
from opsd_train.data import generated, sources
from opsd_train.hub import HUB_ID, check_id

ROWS = 1000  # that are looked at
LARGE = 1 << 26  # bytes of a file that is not looked into


def check(
    arguments: Sequence[str],
    kinds: Sequence[str] = option_names.KINDS,
    preset: str | None = None,
    config: Path | None = None,
    bad_rows: bool = False,
) -> None:
    """Raise the ValueError that the command would end with later, as far as it needs no model.

    Args:
        arguments: `--name value`, as they were given.
        kinds: the dataclasses that have the options.
        preset: name of one whose options count first.
        config: YAML file whose options count next.
        bad_rows: whether the command itself tells which rows are bad.
    """
    known = option_names.options(kinds)
    given: dict[str, Any] = {}
    for layer in layers(preset, config):
        given |= held(layer, known)
    words = (word[2:].partition("=") for word in joined(arguments, known) if word.startswith("--"))
    given |= {name: value for name, equals, value in words if equals}
    for name in ("model", "teacher_model"):
        if given.get(name):
            _check_model(name, str(given[name]))
    for name in ("data", "eval_data"):
        if given.get(name):
            _check_data(name, str(given[name]), bad_rows or bool(int(given.get("skip_bad_rows") or 0)))


def _check_model(option: str, name: str) -> None:
    """A folder, or the id of a model."""
    if Path(name).is_dir():
        return
    if not HUB_ID.fullmatch(name):
        raise ValueError(f"{option}: expected a local folder or a hub id, got {name!r}, which is neither")
    check_id(option, name, "model")


def _check_data(option: str, name: str, bad_rows: bool) -> None:
    """The beginning of files of text, the existence of others, or the id of a data set."""
    path, base = Path(name), name.partition("?")[0]
    if name.startswith(generated.PREFIX) or Path(base).is_dir():
        return
    if path.is_file() or any(sign in base for sign in "*[") or path.suffix in sources.FORMATS:
        if path.is_file() and (path.suffix == ".parquet" or path.stat().st_size > LARGE):
            return
        first = list(islice(sources.records(name), ROWS))
        for one in first:
            if one.error is not None and not bad_rows:
                raise ValueError(one.error)
        if not first:
            raise ValueError(f"data: expected at least one row in {name}, got none")
        return
    repository = base.partition(":")[0]
    if not HUB_ID.fullmatch(repository):
        raise ValueError(f"data: expected {sources.EXPECTED}; got {name}, which does not exist")
    check_id(option, repository, "dataset")

"""From YAML and the command line to dataclasses: the command line beats YAML, YAML beats the defaults."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser


class _Parser(HfArgumentParser):
    """argparse that raises instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(
    kinds: Sequence[Any], configs: Sequence[Path], arguments: Sequence[str], defaults: Sequence[str] = ()
) -> tuple[Any, ...]:
    """Build the dataclasses from defaults, YAML files and `--name value` arguments; the later one counts.

    Raises ValueError naming a key that is not a field, with close matches, or a value that does not fit.
    """
    names = [field.name for kind in kinds for field in fields(kind)]
    argv = list(defaults) + [argument for path in configs for argument in _from_yaml(path, names)]
    for argument in arguments:
        if argument.startswith("--"):
            key = argument[2:].split("=")[0].replace("-", "_")
            check_known(key.removeprefix("no_") if key not in names else key, names, "command line")
    parser = _Parser(list(kinds), allow_abbrev=False)
    return parser.parse_args_into_dataclasses([*argv, *arguments], look_for_args_file=False)


def check_known(key: str, names: Sequence[str], where: str) -> None:
    """Raise ValueError unless `key` is one of the names."""
    if key not in names:
        close = difflib.get_close_matches(key, names, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; `opsd options` lists what there is"
        raise ValueError(f"{where}: unknown option {key}{hint}")


def _from_yaml(path: Path, names: Sequence[str]) -> list[str]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config: expected a YAML file at {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config: expected YAML in {path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"config: expected `name: value` lines in {path}, got {type(found).__name__}")
    arguments: list[str] = []
    for key, value in found.items():
        check_known(str(key).replace("-", "_"), names, str(path))
        arguments += _arguments(str(key), value)
    return arguments


def _arguments(key: str, value: Any) -> list[str]:
    """The command-line form, so that YAML's values pass through the same conversions and checks."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]

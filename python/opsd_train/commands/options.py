"""From presets, YAML and the command line to dataclasses; each of them beats the ones before."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from opsd_train.commands.presets import Preset, preset
from opsd_train.data.strict import StrictLoader

COMMAND_LINE = "command line"
# Two ways to say one thing: where a later place says it in one way, what an earlier one says is beaten.
EITHER = ("max_steps", "num_train_epochs")


class _Parser(HfArgumentParser):
    """argparse that raises instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(
    kinds: Sequence[Any],
    configs: Sequence[Path | Preset],
    arguments: Sequence[str],
    defaults: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Build the dataclasses from defaults, presets and YAML files, and `--name value` arguments.

    The later one counts; null in a file takes back what an earlier file or preset says. Raises ValueError
    naming a key that is not a field, with close matches, or a value that does not fit.
    """
    names = [field.name for kind in kinds for field in fields(kind)]
    given: dict[str, Any] = {}
    for config in configs:
        held = config.options if isinstance(config, Preset) else _from_yaml(config, names)
        given = _over(given, {key.replace("-", "_"): value for key, value in held.items()})
    said = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    given = {key: value for key, value in given.items() if key not in EITHER or not said.intersection(EITHER)}
    argv = list(defaults) + [word for key, value in given.items() for word in _arguments(key, value)]
    for argument in arguments:
        if argument.startswith("--"):
            key = argument[2:].split("=")[0].replace("-", "_")
            check_known(bare if (bare := key.removeprefix("no_")) in names else key, names, COMMAND_LINE)
    parser = _Parser(list(kinds), allow_abbrev=False)
    return parser.parse_args_into_dataclasses([*argv, *arguments], look_for_args_file=False)


def _over(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """What both say; the later one counts."""
    beaten = EITHER if any(later.get(name) is not None for name in EITHER) else ()
    return {name: value for name, value in earlier.items() if name not in beaten} | later


def layers(preset_name: str | None, config: Path | None) -> list[Path | Preset]:
    """What `--preset` and `--config` name, in the order in which they count."""
    first: list[Path | Preset] = [] if preset_name is None else [preset(preset_name)]
    return first if config is None else [*first, config]


def check_known(key: str, names: Sequence[str], where: str) -> None:
    """Raise ValueError unless `key` is one of the names."""
    if key not in names:
        written = _written if where == COMMAND_LINE else str
        close = list(map(written, _close(key, names)))
        hint = f"; did you mean {' or '.join(close)}?" if close else "; `opsd options` lists what there is"
        raise ValueError(f"{where}: unknown option {written(key)}{hint}")


def _close(key: str, names: Sequence[str]) -> list[str]:
    """The names most like a key, best first; none that is much less like it than the first one."""

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, name, key).ratio()

    close = difflib.get_close_matches(key, names, n=3, cutoff=0.7)
    return [name for name in close if likeness(name) >= likeness(close[0]) - 0.1]


def _written(key: str) -> str:
    """An option as the command line has it."""
    return f"--{key.replace('_', '-')}"


def _from_yaml(path: Path, names: Sequence[str]) -> dict[str, Any]:
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise ValueError(f"config: expected a YAML file at {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config: expected YAML in {path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"config: expected `name: value` lines in {path}, got {type(found).__name__}")
    for key in found:
        check_known(str(key).replace("-", "_"), names, str(path))
    return {str(key): value for key, value in found.items()}


def _arguments(key: str, value: Any) -> list[str]:
    """The command-line form, so that YAML's values pass through the same conversions and checks."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]

"""What the command line and YAML files say, before anything is made of it."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from opsd_train.commands.presets import Preset, preset
from opsd_train.data.strict import load_yaml

COMMAND_LINE = "command line"
WORDS_OF_BOOL = ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0")


def layers(preset_name: str | None, config: Path | None) -> list[Path | Preset]:
    """What `--preset` and `--config` name, in the order in which they count."""
    first: list[Path | Preset] = [] if preset_name is None else [preset(preset_name)]
    return first if config is None else [*first, config]


def joined(arguments: Sequence[str], known: Mapping[str, str]) -> list[str]:
    """Each option and its value as one word, `--name=value`, whatever the value begins with.

    Args:
        arguments: as they were given.
        known: what stands behind each option, see `option_names.options`.

    Raises:
        ValueError: an option that is none, with close names; one without a value; a value without an option.
    """
    rest, found = list(arguments), list[str]()
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{COMMAND_LINE}: expected --name value, got {word!r} without a name")
        name, equals, value = word[2:].partition("=")
        key = name.replace("-", "_")
        denied = key.removeprefix("no_") if known.get(key.removeprefix("no_")) == "switch" else key
        check_known(denied, list(known), COMMAND_LINE)
        if equals:
            found.append(f"--{key}={value}")
        elif known[denied] == "value":
            found.append(f"--{key}={_value(key, rest, known)}")
        elif known[denied] == "several":
            found.append(f"--{key}")
            while rest and not rest[0].startswith("--"):
                found.append(rest.pop(0))
        elif rest and _stands_behind(known[denied], rest[0]):
            found.append(f"--{key}={rest.pop(0)}")
        else:
            found.append(f"--{key}")
    return found


def _stands_behind(kind: str, word: str) -> bool:
    """Whether a word is the value of an option that need not have one."""
    return word.lower() in WORDS_OF_BOOL if kind == "switch" else not word.startswith("--")


def _value(key: str, rest: list[str], known: Mapping[str, str]) -> str:
    """The word behind an option, which may begin with dashes, unless it is another option."""
    if not rest:
        raise ValueError(f"{COMMAND_LINE}: expected a value behind {written(key)}, got none")
    name = rest[0].removeprefix("--").split("=")[0].replace("-", "_")
    if rest[0].startswith("--") and name in known:
        raise ValueError(
            f"{COMMAND_LINE}: expected a value behind {written(key)}, got the option {rest[0]}; if it is the "
            f"value, write {written(key)}={rest[0]}"
        )
    return rest.pop(0)


def check_known(key: str, names: Sequence[str], where: str) -> None:
    """Raise ValueError unless `key` is one of the names."""
    if key not in names:
        shown = written if where == COMMAND_LINE else str
        close = list(map(shown, _close(key, names)))
        hint = f"; did you mean {' or '.join(close)}?" if close else "; `opsd options` lists what there is"
        raise ValueError(f"{where}: unknown option {shown(key)}{hint}")


def _close(key: str, names: Sequence[str]) -> list[str]:
    """The names most like a key, best first; none that is much less like it than the first one."""

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, name, key).ratio()

    close = difflib.get_close_matches(key, names, n=3, cutoff=0.7)
    return [name for name in close if likeness(name) >= likeness(close[0]) - 0.1]


def written(key: str) -> str:
    """An option as the command line has it."""
    return f"--{key.replace('_', '-')}"


def held(config: Path | Preset, known: Mapping[str, str]) -> dict[str, Any]:
    """The options in a YAML file or a preset, by name. ValueError naming the file that is wrong."""
    given = config.options if isinstance(config, Preset) else _from_yaml(config)
    where = place_of(config)
    found = {str(key).replace("-", "_"): value for key, value in given.items()}
    for key, value in found.items():
        check_known(key, list(known), where)
        if isinstance(value, list) and known[key] != "several":
            raise ValueError(f"{where}: {key}: expected one value, got the list {value!r}")
    return found


def place_of(config: Path | Preset) -> str:
    """How messages call a source of options."""
    return f"preset {config.name}" if isinstance(config, Preset) else str(config)


def _from_yaml(path: Path) -> Mapping[Any, Any]:
    try:
        found = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config: expected a YAML file at {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config: expected YAML in {path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"config: expected `name: value` lines in {path}, got {type(found).__name__}")
    return found

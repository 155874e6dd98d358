"""From presets, YAML and the command line to dataclasses; each of them beats the ones before."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from opsd_train.commands import option_names
from opsd_train.commands.presets import Preset
from opsd_train.commands.words import COMMAND_LINE, held, joined, layers, place_of

# Two ways to say one thing: where a later place says it in one way, what an earlier one says is beaten.
EITHER = ("max_steps", "num_train_epochs")
__all__ = ["layers", "parse"]


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
    naming a key that is not a field, with close matches, or a value that does not fit, and where it is from.
    """
    known = option_names.options([kind.__name__ for kind in kinds])
    given: dict[str, Any] = {}
    places: dict[str, str] = {}
    for config in configs:
        found = held(config, known)
        given = _over(given, found)
        places |= dict.fromkeys(found, place_of(config))
    words = joined(arguments, known)
    said = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    places |= dict.fromkeys(said, COMMAND_LINE)
    given = {key: value for key, value in given.items() if key not in EITHER or not said.intersection(EITHER)}
    argv = list(defaults) + [word for key, value in given.items() for word in _arguments(key, value)]
    parser = _Parser(list(kinds), allow_abbrev=False)
    try:
        return parser.parse_args_into_dataclasses([*argv, *words], look_for_args_file=False)
    except ValueError as error:
        named = re.match(r"(?:argument --)?([\w-]+)[/:]", str(error))
        where = None if named is None else places.get(named[1].replace("-", "_"))
        raise ValueError(str(error) if where in (None, COMMAND_LINE) else f"{where}: {error}") from error


def _over(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """What both say; the later one counts."""
    beaten = EITHER if any(later.get(name) is not None for name in EITHER) else ()
    return {name: value for name, value in earlier.items() if name not in beaten} | later


def _arguments(key: str, value: Any) -> list[str]:
    """The command-line form, so that YAML's values pass through the same conversions and checks."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]

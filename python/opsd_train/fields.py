"""How a field of a configuration is written: its text, and JSON as its value."""

import json
import math
from collections.abc import Iterator
from dataclasses import field, fields
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


def option(default: T, help: str) -> T:
    """A field with the text that `opsd options` shows."""
    return field(default=default, metadata={"help": help})


def check_finite(settings: Any) -> None:
    """ValueError naming a field of a dataclass that is no finite number, or that holds one."""
    for one in fields(settings):
        for value in _numbers(getattr(settings, one.name, None)):
            if not math.isfinite(value):
                raise ValueError(f"{one.name}: expected a finite number, got {value}")


def _numbers(value: Any) -> Iterator[float]:
    """The floats in a value of JSON's kinds."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for held in value.values() if isinstance(value, dict) else value:
            yield from _numbers(held)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def json_object(name: str, value: Any) -> dict[str, Any]:
    """A JSON object from text or as it is; ValueError for anything else."""
    try:
        found = json.loads(value, parse_constant=_no_constant) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{name}: expected a JSON object, got {value!r}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected a JSON object, got {value!r}")
    return found

"""How a field of a configuration is written: its text, and JSON as its value."""

import json
from dataclasses import field
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: T, help: str) -> T:
    """A field with the text that `opsd options` shows."""
    return field(default=default, metadata={"help": help})


def json_object(name: str, value: Any) -> dict[str, Any]:
    """A JSON object from text or as it is; ValueError for anything else."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: expected a JSON object, got {value!r}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected a JSON object, got {value!r}")
    return found

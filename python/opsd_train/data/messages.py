"""Chat messages and tools as a record has them."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from opsd_train.reading.prompts import Message

# What a message may have in place of a text.
CALLS = ("tool_calls", "function_call")


def read_messages(value: Sequence[Any], column: str, where: str) -> tuple[Message, ...]:
    """The messages with all that they have but nulls; ValueError for what is none."""
    if not all(isinstance(m, Mapping) and _is_message(m) for m in value):
        raise ValueError(
            f"{where}: expected messages with a role and a content in column {column!r}, got {value!r}"
        )
    if value[-1]["role"] == "assistant":
        raise ValueError(f"{where}: expected column {column!r} to end before the assistant's turn")
    messages = [without_nulls(message) for message in value]
    for message in messages:
        message.setdefault("content", "")
        for part in message.values():
            if isinstance(part, str):
                check_encodable(part, column, where)
    return tuple(messages)


def read_tools(record: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    """The column `tools`, a list of objects or JSON of one; none where there is no such column."""
    held = record.get("tools")
    if held is None:
        return ()
    try:
        found = json.loads(held) if isinstance(held, str) else held
    except ValueError as error:
        raise ValueError(f"{where}: expected JSON in column 'tools', got {held[:60]!r}: {error}") from None
    if not isinstance(found, list | tuple) or not all(isinstance(tool, Mapping) for tool in found):
        raise ValueError(f"{where}: expected a list of objects in column 'tools', got {held!r}")
    return tuple(without_nulls(tool) for tool in found)


def without_nulls(value: Any) -> Any:
    """Without what is null, at any depth: a table gives every object the keys of all of them."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def check_encodable(text: str, column: str, where: str) -> None:
    """ValueError for text that is none: JSON can name halves of characters that UTF-8 has no bytes for."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: expected text in column {column!r}, got the lone surrogate "
            f"U+{ord(text[error.start]):04X} in it"
        ) from None


def is_nan(value: Any) -> bool:
    """Whether a value is what tables have where there is none."""
    return isinstance(value, float) and math.isnan(value)


def _is_message(message: Mapping[str, Any]) -> bool:
    if not isinstance(role := message.get("role"), str) or not role.strip():
        return False
    content = message.get("content")
    if any(message.get(name) for name in CALLS):
        return content is None or isinstance(content, str)
    return isinstance(content, str) and bool(content.strip())

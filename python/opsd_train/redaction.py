"""Passwords and keys that stand in options: they are used, and neither shown nor written down."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
# Who a URL is for, up to the last @, also behind the option of a URL that has no scheme.
USER = re.compile(r"(://|url[=\s]+['\"]?)[^\s'\"]*@", re.IGNORECASE)
KEY = re.compile(r"(api[-_]key['\"]?(?:\s*[=:]\s*|\s+))(\"[^\"]*\"|'[^']*'|[^\s'\"]+)", re.IGNORECASE)


def redact(text: str) -> str:
    """A text without the passwords of URLs and without API keys."""
    return KEY.sub(rf"\1{HIDDEN}", USER.sub(rf"\1{HIDDEN}@", text))


def redacted(value: Any) -> Any:
    """The same of all texts in mappings and sequences; other values stay as they are."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redacted(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(held) for held in value]
    return value


def redacted_url(url: str) -> str:
    """A URL, or what is given as one, without its user and password."""
    before, at, host = url.rpartition("@")
    scheme = f"{before.partition('://')[0]}://" if "://" in before else ""
    return f"{scheme}{HIDDEN}@{host}" if at else url

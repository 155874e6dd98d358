"""Options of published runs, by name: `--preset opsd`."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "preset_files"


@dataclass(frozen=True)
class Preset:
    """Options as published.

    Args:
        name: how options call it.
        about: what is trained, in a line.
        source: the paper and the code that they are from.
        notes: what a reader of that paper would ask.
        options: of `RunOptions` and `OPSDConfig`, by name.
    """

    name: str
    about: str
    source: str
    notes: str
    options: Mapping[str, Any]


def names() -> list[str]:
    """All presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def preset(name: str) -> Preset:
    """One preset; ValueError with close names if there is none."""
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"preset: expected one of {', '.join(names())}; got {name!r}{hint}")
    return Preset(name, **yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))

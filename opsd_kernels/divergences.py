"""Reads `divergences.def`, the one table of divergences, for the backends written in Python."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("divergences.def")
LETTERS = ("s", "t", "d", "rs", "rt", "beta")


@dataclass(frozen=True)
class Divergence:
    """One line of the table: the sources of its three expressions over `LETTERS`."""

    name: str
    value: str
    slack: str
    weight: str

    @property
    def uses_mixture(self) -> bool:
        """Whether any expression needs rs or rt, which cost a logarithm per entry."""
        return self._reads("rs|rt")

    @property
    def uses_beta(self) -> bool:
        """Whether the objective's parameter matters."""
        return self._reads("rs|rt|beta")

    def _reads(self, letters: str) -> bool:
        return any(re.search(rf"\b({letters})\b", source) for source in (self.value, self.slack, self.weight))


def table() -> dict[str, Divergence]:
    """Every divergence by name, in the order of the file."""
    return _DIVERGENCES


def compile_expression(source: str, functions: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The expression as a function of `LETTERS`; `functions` gives the table's functions of the backend."""
    return eval(f"lambda {', '.join(LETTERS)}: {source}", dict(functions))


def _split_arguments(text: str) -> list[str]:
    """Splits at the commas that no parenthesis encloses."""
    arguments, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return [argument.strip() for argument in arguments]


def _read() -> dict[str, Divergence]:
    entries = re.findall(r"^DIVERGENCE\((.*)\)\s*$", TABLE.read_text(), flags=re.MULTILINE)
    divergences = (Divergence(*_split_arguments(entry)) for entry in entries)
    return {divergence.name: divergence for divergence in divergences}


_DIVERGENCES = _read()

"""What an entry of the methods' table consists of, and the table itself."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opsd_kernels.recipes import Recipe

# The modules of entries, in the order of the page; the package imports them.
MODULES = (
    "privileged", "feedback", "views", "estimates", "hindsight", "sampled", "weighted", "combined",
    "foundations",
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """An entry of the table.

    Args:
        key: its name, that of the function.
        title: of the paper or system.
        arxiv: number of the paper, or a URL.
        teacher: whose weights with which context.
        build: makes the recipe; its keyword arguments are the method's options, published values by default.
        driver: pieces of the driver that it needs beside the loss.
        published: hyperparameters of the published runs that are not the loss's.
        scope: what of it is a loss of tokens, and what is out of scope and why; empty if all of it is.
        differs: where paper and published code differ, and which option says so.
        library: what the driver cannot supply, so that only the library minimises it; empty if it can.
        alone: options with which it needs none of that; None if there are none.
        schedule: options that change with the step as published -> the arguments of `schedules.linear`, which
            the driver follows unless it is told another value or schedule.

    The test that pins it is `test_<key>` in `tests/test_methods_<module>.py`.
    """

    key: str
    title: str
    arxiv: str
    teacher: str
    build: Callable[..., Recipe]
    driver: tuple[str, ...] = ()
    published: str = ""
    scope: str = ""
    differs: str = ""
    library: str = ""
    alone: Mapping[str, Any] | None = None
    schedule: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """The module of the entry."""
        return self.build.__module__.rpartition(".")[2]

    @property
    def note(self) -> str:
        """The entry's docstring: what it minimises, in one line or two."""
        return " ".join((self.build.__doc__ or "").split())

    @property
    def options(self) -> dict[str, Any]:
        """The method's options and their defaults."""
        return {name: x.default for name, x in inspect.signature(self.build).parameters.items()}

    def recipe(self, **options: Any) -> Recipe:
        """The recipe with some options in place of the published ones.

        Raises:
            ValueError: an option that the method does not have.
        """
        for name in options:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise ValueError(f"{self.key}: expected options among {known}; got {name!r}")
        return self.build(**options)


_METHODS: dict[str, Method] = {}


def method(
    title: str, arxiv: str, *, teacher: str, driver: tuple[str, ...] = (), published: str = "",
    scope: str = "", differs: str = "", library: str = "", alone: Mapping[str, Any] | None = None,
    schedule: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[Callable[..., Recipe]], Callable[..., Recipe]]:  # fmt: skip
    """Decorator that puts a function into the table under its own name; see `Method` for the arguments."""

    def add(build: Callable[..., Recipe]) -> Callable[..., Recipe]:
        key = build.__name__
        if key in _METHODS:
            raise ValueError(f"method: expected a name of its own; got {key!r} twice")
        _METHODS[key] = Method(
            key,
            title,
            arxiv,
            teacher,
            build,
            driver,
            published,
            scope,
            differs,
            library,
            alone,
            schedule or {},
        )
        return build

    return add


def names() -> tuple[str, ...]:
    """Every method's name, in the order of the table."""
    return tuple(_METHODS)


def get_method(key: str) -> Method:
    """The method of that name; ValueError with close matches."""
    if key not in _METHODS:
        close = difflib.get_close_matches(key.lower(), _METHODS, n=3)
        hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
        raise ValueError(
            f"method: expected one of the {len(_METHODS)} of docs/methods.md, which `opsd methods` lists; "
            f"got {key!r}{hint}"
        )
    return _METHODS[key]


def recipe(key: str, **options: Any) -> Recipe:
    """What a method minimises, with its published options or others.

    Raises:
        ValueError: a method or an option that does not exist.
    """
    return get_method(key).recipe(**options)

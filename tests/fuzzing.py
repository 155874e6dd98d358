"""Random cases: the same ones in every run, and a smaller share of fresh ones by `--fuzz-seed`."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings


def fuzz(cases: int, *args: Any, **kwargs: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on so many cases, a quarter of them fresh. The strategies are passed on to `given`."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        fresh = cases // 4
        common = settings(deadline=None, database=None, print_blob=True)
        drawn = settings(common, max_examples=fresh)(given(*args, **kwargs)(test))
        fixed = settings(common, max_examples=cases - fresh, derandomize=True)(given(*args, **kwargs)(test))

        @pytest.mark.parametrize("run", [fixed, drawn], ids=["fixed", "fresh"])
        def shares(run: Callable[[], None]) -> None:
            run()

        shares.__doc__ = test.__doc__
        return shares

    return decorate

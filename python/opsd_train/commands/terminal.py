"""What the commands share: the console, one message for a mistake, quiet libraries."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

logger = logging.getLogger(__name__)
console = Console()
ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}


def quiet() -> None:
    """One progress bar is enough: the driver's own."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def user_errors() -> Iterator[None]:
    """Print what the user got wrong as one message, without a traceback, and leave with exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(code=2) from None


@contextmanager
def early_ends() -> Iterator[None]:
    """Print why a run ended early as one message, and leave with its exit code.

    128 plus its number for a signal that stopped the run (143 for SIGTERM, 130 for SIGINT), 1 for steps that
    were not finite, an engine that failed, a checkpoint that could not be written, and what was found
    to be wrong too late for `user_errors`.
    """
    from opsd_train.engines.base import EngineError
    from opsd_train.safety.atomic import CheckpointError
    from opsd_train.safety.keep import BadSteps
    from opsd_train.safety.stops import Stopped

    try:
        yield
    except (Stopped, BadSteps, EngineError, CheckpointError, ValueError, OSError) as error:
        logger.debug("ended", exc_info=True)
        said = "; ".join([str(error), *getattr(error, "__notes__", [])])
        Console(stderr=True).print(f"[red]ended:[/red] {escape(said)}", highlight=False, soft_wrap=True)
        raise typer.Exit(code=error.code if isinstance(error, Stopped) else 1) from None

"""What the commands share: the console, one message for a mistake, quiet libraries."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opsd_train.redaction import redact

logger = logging.getLogger(__name__)
console = Console()
OWN = {"opsd_train", "opsd_kernels"}
FOUND_NO_GPU = "Setting accelerator to"
ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}


def quiet() -> None:
    """One progress bar is enough, the driver's own, and a warning is one line."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # Installed DeepSpeed says at its import, whether it is used or not, that it has found no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda one: not one.getMessage().startswith(FOUND_NO_GPU))
    # PEFT asks for the configuration of a base model without a name when adapters are saved.
    warnings.filterwarnings("ignore", "Could not find a config file in")
    warnings.formatwarning = _as_line


def _as_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as the driver says it; where one of another package is from stands behind it."""
    own = category is UserWarning and OWN.intersection(Path(filename).parts)
    said = redact(str(message))
    return f"warning: {said}\n" if own else f"warning: {said} ({category.__name__}, {filename}:{lineno})\n"


def show(table: Table) -> None:
    """Print a table, with its title and caption as plain lines, which are not squeezed into its width."""
    title, caption = table.title, table.caption
    table.title = table.caption = None
    for shown in (title, table, caption):
        if shown:
            console.print(shown, highlight=False, markup=False)


@contextmanager
def user_errors() -> Iterator[None]:
    """Print what the user got wrong as one message, without a traceback, and leave with exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        _complain("error", str(error))
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
        _complain("ended", said)
        raise typer.Exit(code=error.code if isinstance(error, Stopped) else 1) from None


def _complain(how: str, why: str) -> None:
    """One message, without passwords and keys."""
    said = f"[red]{how}:[/red] {escape(redact(why))}"
    Console(stderr=True).print(said, highlight=False, soft_wrap=True)


@contextmanager
def leaving_the_others() -> Iterator[None]:
    """However the command ends inside, this process leaves its process group while Python still works.

    A thread of gloo may hold the last tensors of a collective. Where it is left to the end of the interpreter
    to stop that thread, letting go of them can abort the process: a run that has saved everything ends with
    an error of its launcher.
    """
    failed = True
    try:
        yield
        failed = False
    except SystemExit as end:
        failed = end.code not in (None, 0)
        raise
    finally:
        if "torch.distributed" in sys.modules:  # `opsd --help` waits for no import
            _leave(failed)


def _leave(failed: bool) -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        if failed:  # NCCL would wait for the others, who may be in a collective that this process left
            dist.group.WORLD.abort()  # type: ignore[union-attr]
        dist.destroy_process_group()

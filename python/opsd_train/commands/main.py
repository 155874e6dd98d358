"""The command `opsd`."""

import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

from opsd_train.commands import early
from opsd_train.commands.data import data_tools
from opsd_train.commands.models import model_tools
from opsd_train.commands.option_names import OF_THE_DEMO
from opsd_train.commands.terminal import (
    ANY_OPTION,
    console,
    early_ends,
    leaving_the_others,
    quiet,
    user_errors,
)
from opsd_train.commands.tools import tools

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # joins the lines of a paragraph
    help="On-policy self-distillation: a model learns from what it knows once it has seen the solution.",
)
app.add_typer(tools)
app.add_typer(data_tools)
app.add_typer(model_tools)


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"opsd-kernels {version('opsd-kernels')}", highlight=False)
        raise typer.Exit


@app.callback()
def opsd(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """On-policy self-distillation: a model learns from what it knows once it has seen the solution."""


@app.command(context_settings=ANY_OPTION)
def demo(
    context: typer.Context,
    steps: Annotated[int, typer.Option(help="Optimizer steps of 128 rollouts each.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of problems and rollouts.")] = 0,
    out: Annotated[Path, typer.Option(help="The run folder; an earlier demo in it is replaced.")] = Path(
        "opsd-demo"
    ),
) -> None:
    """Teach three-digit addition to a small model on the CPU, in about two minutes.

    Any option that `opsd options` lists can be given: --objective, --entry-clip, --clip-mode, --teacher and
    so on.
    """
    with user_errors():
        early.check(context.args, [OF_THE_DEMO])
    from opsd_train.demo import run as demo_run
    from opsd_train.train import run

    quiet()
    given = [f"--max_steps={steps}", f"--seed={seed}", f"--output_dir={out}", *context.args]
    with early_ends(), user_errors():
        trainer = demo_run.demo(given, console)
    command, task = "opsd demo", "the demo's model, on three-digit addition"
    about = {"command": command, "name": command, "model": task}
    with early_ends():
        _say(run(trainer, about, console, existing="replace"))


@app.command(context_settings=ANY_OPTION)
def train(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Local folder or hub id of a causal language model.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Training rows: a file, folder, hub id or reasoning_gym:TASK.")
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out rows, to measure accuracy on.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Options of a published run, see `opsd presets`; all others beat it.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with options; the command line beats it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; opsd-run if none is named.")] = None,
) -> None:
    """Self-distil a model on rows of your own.

    Rows have the columns problem and solution, or prompt and privileged_context, or prompt and
    teacher_prompt.

    Any option that `opsd options` lists can be given: --lora-rank 64, --gguf-file NAME, --learning-rate 1e-5
    and so on.
    """
    named = {"model": model, "data": data, "eval_data": eval_data, "output_dir": out}
    given = [f"--{name}={value}" for name, value in named.items() if value is not None]
    with user_errors():
        early.check([*given, *context.args], preset=preset, config=config)
    from opsd_train.commands.options import layers, parse
    from opsd_train.config import OPSDConfig
    from opsd_train.run_options import RunOptions
    from opsd_train.train import run
    from opsd_train.train import train as prepare

    quiet()
    with early_ends(), user_errors():
        defaults = ["--output_dir=opsd-run", *(["--eval_strategy=steps"] if eval_data else [])]
        options, settings = parse(
            [RunOptions, OPSDConfig], layers(preset, config), [*given, *context.args], defaults
        )
        trainer = prepare(options, settings, console)
    existing: Literal["resume", "error"] = "resume" if settings.resume_from_checkpoint else "error"
    about = {"command": "opsd train", "name": Path(settings.output_dir).name, "model": options.model}
    about["options"] = asdict(options)
    with early_ends():
        _say(run(trainer, about, console, existing=existing))


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run folder, finished or not.")]) -> None:
    """Write report.html into a run folder anew."""
    from opsd_train.report.page import write_report

    with user_errors():
        _say(write_report(run_dir))


@app.command()
def options(
    word: Annotated[
        str | None, typer.Argument(help="Only options with this in their name or meaning.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also the other ones of transformers.TrainingArguments.")
    ] = False,
) -> None:
    """List the options that `opsd train`, `opsd demo` and their YAML files take, with their defaults."""
    from opsd_train.commands.option_list import listed

    with user_errors():
        console.print(listed(everything, word), highlight=False)


def _say(report: Path | None) -> None:
    """Where the report is; a process that did not write it says nothing."""
    if report is not None:
        console.print(f"report: {report}", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the command line."""
    # Read at tqdm's import: loading GGUF files has a bar of its own.
    os.environ.setdefault("TQDM_DISABLE", "1")
    with leaving_the_others():
        app()

"""The commands of `opsd` that concern data and presets."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from opsd_train.commands import early
from opsd_train.commands.terminal import ANY_OPTION, console, quiet, show, user_errors

data_tools = typer.Typer()


@data_tools.command(context_settings=ANY_OPTION)
def check(
    context: typer.Context,
    data: Annotated[str, typer.Argument(help="Rows: a file, folder, glob, hub id or reasoning_gym:TASK.")],
    model: Annotated[
        str | None, typer.Option(help="Whose tokenizer counts and shows tokens; without it, texts are shown.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Options of a published run.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the run's options.")] = None,
    rows: Annotated[int, typer.Option(help="Rows to show, token by token with a model.")] = 1,
    refused: Annotated[int, typer.Option(help="Refused rows to show.")] = 5,
) -> None:
    """Show what a run would make of its data: columns, lengths against budgets, tokens, refused rows.

    Nothing is trained and no weights are loaded. Leaves with exit code 1 if a row would be refused. Any
    option that `opsd options` lists can be given.
    """
    given = [f"--data={data}", f"--model={model or ''}", *context.args]
    with user_errors():
        early.check(given, preset=preset, config=config, bad_rows=True)
    from opsd_train.commands.options import layers, parse
    from opsd_train.config import OPSDConfig
    from opsd_train.data.check import check as check_data
    from opsd_train.data.check_report import tables
    from opsd_train.loading import load_reader
    from opsd_train.run_options import RunOptions

    quiet()
    with user_errors():
        options, settings = parse(
            [RunOptions, OPSDConfig], layers(preset, config), given, ["--output_dir=opsd-unused"]
        )
        reader = load_reader(options.model, options.gguf_file, options.revision) if options.model else None
        found = check_data(options, settings, reader)
    for shown in tables(found, settings, reader, rows, refused):
        console.print(shown, highlight=False, soft_wrap=isinstance(shown, str))
    if found.refused:
        raise typer.Exit(code=1)


@data_tools.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="One of them, to see what it sets.")] = None,
) -> None:
    """List the options of published runs that `--preset` gives, or what one of them sets."""
    from opsd_train.commands.presets import names, preset

    with user_errors():
        if name is None:
            table = Table("preset", "what", "source")
            for one in map(preset, names()):
                table.add_row(one.name, escape(one.about), escape(one.source))
        else:
            one = preset(name)
            table = Table(title=f"{one.name}: {one.about}", show_header=False, title_justify="left")
            for key, value in one.options.items():
                table.add_row(key, escape(str(value)))
            table.add_row("source", escape(one.source))
            table.add_row("notes", escape(one.notes))
    show(table)

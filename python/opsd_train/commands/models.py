"""The command of `opsd` that concerns models."""

from pathlib import Path
from typing import Annotated

import typer

from opsd_train.commands.terminal import console, quiet, user_errors

model_tools = typer.Typer()


@model_tools.command()
def merge(
    model: Annotated[str, typer.Argument(help="Folder or hub id of adapters, or a run folder.")],
    out: Annotated[Path, typer.Option(help="The new folder of the model; nothing that exists is replaced.")],
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 or float16, which round.")] = "float32",
    gguf_file: Annotated[
        str | None, typer.Option(help="The GGUF file of the model that the adapters were trained on.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub id.")] = None,
) -> None:
    """Write adapters and the model they were trained on as one model, with its tokenizer."""
    from opsd_train import loading
    from opsd_train.evaluation.run import resolve

    quiet()
    with user_errors():
        found, _ = resolve(model)
        loading.merge(loading.Source(found, dtype, gguf_file, revision), out)
    console.print(f"written: {out}", highlight=False, soft_wrap=True)

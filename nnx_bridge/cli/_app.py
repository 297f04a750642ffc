"""The command `flaxlift`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from nnx_bridge.cli._check import check_command
from nnx_bridge.cli._convert import convert_command
from nnx_bridge.cli._inspect import inspect_command

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flaxlift {version('flaxlift')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Moves Flax Linen models to Flax NNX, and proves that nothing changed."""


app.command("check")(check_command)
app.command("convert")(convert_command)
app.command("inspect")(inspect_command)


def main() -> None:
    """Runs the command."""
    app()

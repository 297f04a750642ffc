"""The command `flaxlift`."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from nnx_bridge.equivalence._case import CaseError, load_case
from nnx_bridge.equivalence._check import STEPS, check
from nnx_bridge.equivalence._report import Report

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flaxlift {version('flaxlift')}")
        raise typer.Exit


def _check_folder(file: Path | None) -> Path | None:
    # Now, not when the work is done.
    if file is not None and not file.parent.is_dir():
        raise typer.BadParameter(f"{file.parent} is no folder")
    return file


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Moves Flax Linen models to Flax NNX, and proves that nothing changed."""


@app.command("check")
def check_command(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="PACKAGE.MODULE:FACTORY...", help="What to check, see above."),
    ],
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write every row as JSON; `-` for stdout.",
            dir_okay=False,
            callback=_check_folder,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Makes parameters, keys and random directions.")
    ] = 0,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where a target that does not run failed.")
    ] = False,
) -> None:
    """Runs Linen models as NNX and compares them with raw JAX.

    FACTORY is a function without arguments that returns a Linen module and one call of it:
    `(module, args)`, `(module, args, kwargs)`, or an `nnx_bridge.Case`, which can say more.
    The module is imported from the current directory or the environment. For example:

        # my_model.py

        def small():
            return Encoder(features=64), (tokens,), {"deterministic": False}

        $ flaxlift check my_model:small

    For the module itself under `lifted`, and for the module hosted as NNX, it compares with raw JAX
    over `module.apply`: outputs, updated state, gradients of inputs and parameters, and the
    derivative in a random direction of both.

    Exit status: 0 if everything agrees, 1 if something does not, 2 if a target cannot be run.
    """
    # As for `python -m`: a project that is not installed is checked from its own folder.
    sys.path.insert(0, os.getcwd())
    to_stdout = json_file is not None and str(json_file) == "-"
    console, messages = Console(stderr=to_stdout), Console(stderr=True)
    reports = []
    for target in targets:
        try:
            reports.append(_check(target, seed, messages))
        except CaseError as error:
            if traceback:
                messages.print_exception()
            where = "" if target in str(error) else f"{target}: "
            messages.print(Text.assemble(("error: ", "bold red"), where, str(error)))
            raise typer.Exit(2) from error
        console.print(reports[-1])
    if json_file is not None:
        text = json.dumps([report.to_json() for report in reports], indent=2)
        print(text) if to_stdout else json_file.write_text(text + "\n", encoding="utf-8")
    raise typer.Exit(0 if all(report.agrees for report in reports) else 1)


def _check(target: str, seed: int, messages: Console) -> Report:
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    progress = Progress(
        *columns,
        TimeElapsedColumn(),
        console=messages,
        transient=True,
        disable=not messages.is_terminal,
    )
    with progress:
        task = progress.add_task(f"{target}: import", total=STEPS + 1)

        def begin(what: str) -> None:
            progress.update(task, advance=1, description=f"{target}: {what}")

        return check(load_case(target), seed=seed, progress=begin)


def main() -> None:
    """Runs the command."""
    app()

"""The command `flaxlift`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nnx_bridge.cli._console import (
    check_folder,
    fail,
    import_from_here,
    is_stdout,
    steps,
    write_json,
)
from nnx_bridge.cli._inspect import inspect_command
from nnx_bridge.equivalence._case import CaseError, load_case
from nnx_bridge.equivalence._check import check
from nnx_bridge.equivalence._report import Report

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
            callback=check_folder,
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
    import_from_here()
    to_stdout = is_stdout(json_file)
    console, messages = Console(stderr=to_stdout), Console(stderr=True)
    reports = []
    for target in targets:
        try:
            reports.append(_check(target, seed, messages))
        except CaseError as error:
            fail(messages, target, error, traceback)
        console.print(reports[-1])
    if json_file is not None:
        write_json([report.to_json() for report in reports], json_file)
    raise typer.Exit(0 if all(report.agrees for report in reports) else 1)


def _check(target: str, seed: int, messages: Console) -> Report:
    with steps(messages) as progress:
        task = progress.add_task(f"{target}: import", total=None)

        def begin(what: str) -> None:
            progress.update(task, advance=1, description=f"{target}: {what}")

        return check(load_case(target), seed=seed, progress=begin)


app.command("inspect")(inspect_command)


def main() -> None:
    """Runs the command."""
    app()

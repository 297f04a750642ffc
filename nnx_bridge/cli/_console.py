"""What the commands share: where they write, how they show progress, and how they fail."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text


def import_from_here() -> None:
    """As for `python -m`: a project that is not installed is imported from its own folder."""
    sys.path.insert(0, os.getcwd())


def check_folder(file: Path | None) -> Path | None:
    """Finds out that a file cannot be written now, not when the work is done."""
    if file is not None and not file.parent.is_dir():
        raise typer.BadParameter(f"{file.parent} is no folder")
    return file


def is_stdout(file: Path | None) -> bool:
    """Whether `-` was given for a file."""
    return file is not None and str(file) == "-"


def write_json(data: Any, file: Path) -> None:
    """Writes data to a file, or to stdout for `-`."""
    text = json.dumps(data, indent=2)
    if is_stdout(file):
        print(text)
    else:
        file.write_text(text + "\n", encoding="utf-8")


def fail(messages: Console, target: str, error: Exception, traceback: bool) -> NoReturn:
    """Ends the command with status 2 for a target that cannot be run."""
    if traceback:
        messages.print_exception()
    where = "" if target in str(error) else f"{target}: "
    messages.print(Text.assemble(("error: ", "bold red"), where, str(error)))
    raise typer.Exit(2) from error


@contextlib.contextmanager
def steps(messages: Console) -> Iterator[Progress]:
    """A bar that counts steps, where somebody looks on."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    progress = Progress(
        *columns,
        TimeElapsedColumn(),
        console=messages,
        transient=True,
        disable=not messages.is_terminal,
    )
    with progress:
        yield progress

"""The command `flaxlift inspect`."""

from __future__ import annotations

import enum
import pkgutil
from pathlib import Path
from typing import Annotated

import typer
from flax import linen as nn
from rich.console import Console

from nnx_bridge.audit import Audit, inspect
from nnx_bridge.audit._findings import ROUTES
from nnx_bridge.cli._console import (
    check_folder,
    fail,
    import_from_here,
    is_stdout,
    steps,
    write_json,
)
from nnx_bridge.equivalence import CaseError, load_case


class _Route(enum.StrEnum):
    NATIVE = "native"
    COMPAT = "compat"
    BY_HAND = "by-hand"
    HOST_ONLY = "host-only"


def inspect_command(
    targets: Annotated[
        list[str], typer.Argument(metavar="TARGET...", help="What to look at, see above.")
    ],
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write every finding as JSON; `-` for stdout.",
            dir_okay=False,
            callback=check_folder,
        ),
    ] = None,
    at_most: Annotated[
        _Route,
        typer.Option(help="Exit with status 1 if anything takes a route of more work."),
    ] = _Route.HOST_ONLY,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where a target that does not run failed.")
    ] = False,
) -> None:
    """Lists what moving Linen models to NNX takes, before anybody begins.

    TARGET is one of:

    - a package, a module, a file or a folder, such as `my_project.models`: all of its source is
      read, and nothing is run;

    - a class, `my_project.models:Encoder`: its source, and that of the classes in the same file
      that it uses;

    - a function without arguments, `my_project.examples:small`, that returns a Linen module and one
      call of it, as for `flaxlift check`: what really runs, found by tracing, with its settings.

    For each layer, lifted transform, collection, RNG stream, `sow` and `perturb` it says which of
    these routes it takes, and why:

    - `native`: NNX has the same;

    - `compat`: a layer or transform of this package has Linen's semantics;

    - `by hand`: somebody has to write another program;

    - `host only`: it stays in an `nnx_bridge.Host`.

    For example:

        $ flaxlift inspect transformers.models.bert.modeling_flax_bert

        $ flaxlift inspect my_project --json audit.json --at-most compat

    Exit status: 0 if everything could be read, 1 if something takes more work than `--at-most`, 2
    if a target cannot be read.
    """
    import_from_here()
    to_stdout = is_stdout(json_file)
    console, messages = Console(stderr=to_stdout), Console(stderr=True)
    audits = []
    for target in targets:
        try:
            audits.append(_inspect(target, messages))
        except CaseError as error:
            fail(messages, target, error, traceback)
        console.print(audits[-1])
    if json_file is not None:
        write_json([audit.to_json() for audit in audits], json_file)
    more = ROUTES[list(_Route).index(at_most) + 1 :]
    raise typer.Exit(1 if any(audit.counts[route] for audit in audits for route in more) else 0)


def _inspect(target: str, messages: Console) -> Audit:
    with steps(messages) as progress:
        task = progress.add_task(target, total=None)

        def read(file: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, description=f"{target}: {file}")

        if ":" not in target:
            return inspect(target, progress=read)
        try:
            found = pkgutil.resolve_name(target)
        except Exception:
            found = None  # `load_case` finds out what is wrong, and says it.
        if isinstance(found, type) and issubclass(found, nn.Module):
            return inspect(found)
        return inspect(load_case(target))

"""`flaxlift check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nnx_bridge.cli._console import (
    check_folder,
    fail,
    import_from_here,
    is_stdout,
    write_json,
)
from nnx_bridge.cli._console import (
    steps as progress_of,
)
from nnx_bridge.equivalence import CaseError, Report, check, load_case


def _file(option: str, help: str) -> typer.models.OptionInfo:
    return typer.Option(option, metavar="FILE", help=help, dir_okay=False, callback=check_folder)


def check_command(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="PACKAGE.MODULE:FACTORY...", help="What to check, see above."),
    ],
    html_file: Annotated[
        Path | None, _file("--html", "Write one page with tables and plots.")
    ] = None,
    json_file: Annotated[
        Path | None, _file("--json", "Write every row as JSON; `-` for stdout.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Makes parameters, inputs, keys and random directions.")
    ] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from --seed on.")] = 1,
    steps: Annotated[
        int, typer.Option(min=1, help="How many steps of training two models are compared over.")
    ] = 3,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where a target that does not run failed.")
    ] = False,
) -> None:
    """Compares models: a rewrite with its original, or a Linen model with itself as NNX.

    FACTORY is a function without arguments. The module is imported from the current directory or
    the environment.

    **A rewrite.** FACTORY returns `(reference, model, inputs)`, each of Linen or of NNX:

        # my_model.py

        def encoder():
            return LinenEncoder(64), Encoder(64, rngs=nnx.Rngs(0)), (tokens,)

        $ flaxlift check my_model:encoder --html report.html

    Both run with the same parameters, inputs and keys, in training and in prediction. Compared are
    outputs, gradients, directional derivatives, statistics, layers, and steps of training. Each
    difference is stated as a multiple of the rounding errors of the reference itself, and the
    first module at which the two part is named.

    **A Linen model alone.** FACTORY returns `(module, inputs)` or `(module, inputs, kwargs)`:

        def small():
            return Encoder(features=64), (tokens,), {"deterministic": False}

    The module under `lifted`, and the module hosted as NNX, are compared with raw JAX over
    `module.apply`.

    Inputs may be left to chance: `jax.ShapeDtypeStruct((8, 32), "float32")`, or
    `nnx_bridge.Random((8, 16), "int32", high=vocabulary_size)`. An `nnx_bridge.Case` can say more:
    variables, names that differ, the method.

    Exit status: 0 if everything agrees, 1 if something does not, 2 if a target cannot be run.
    """
    import_from_here()
    to_stdout = is_stdout(json_file)
    console, messages = Console(stderr=to_stdout), Console(stderr=True)
    reports = []
    for target in targets:
        try:
            reports.append(_report(target, seed, seeds, steps, messages))
        except CaseError as error:
            fail(messages, target, error, traceback)
        console.print(reports[-1])
    if json_file is not None:
        write_json([report.to_json() for report in reports], json_file)
    if html_file is not None:
        from nnx_bridge.equivalence._html import page

        html_file.write_text(page(*reports), encoding="utf-8")
    raise typer.Exit(0 if all(report.agrees for report in reports) else 1)


def _report(target: str, seed: int, seeds: int, steps: int, messages: Console) -> Report:
    with progress_of(messages) as progress:
        task = progress.add_task(f"{target}: import", total=None)

        def begin(what: str) -> None:
            progress.update(task, advance=1, description=f"{target}: {what}")

        case = load_case(target)
        return check(case, seed=seed, seeds=seeds, steps=steps, progress=begin)

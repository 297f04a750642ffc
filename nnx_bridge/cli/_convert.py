"""The command `flaxlift convert`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from nnx_bridge.checkpoints import LAYOUTS, CheckpointError, Conversion, convert, describe
from nnx_bridge.checkpoints._convert import Progress as Report
from nnx_bridge.checkpoints._orbax_reader import saved_devices
from nnx_bridge.checkpoints._source import locate
from nnx_bridge.weights import Plan


def convert_command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint, see above.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="What is written.")],
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it exists.")] = False,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="For the way to Linen: a Linen checkpoint with the structure wanted.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For a model whose names or shapes differ: what "
            "`nnx_bridge.match(...).save(FILE)` wrote.",
        ),
    ] = None,
    item: Annotated[str | None, typer.Option(help="The item of SRC, where it has several.")] = None,
    layout: Annotated[
        str | None,
        typer.Option(help=f"The layout of SRC, if it is not found: {', '.join(LAYOUTS)}."),
    ] = None,
    unsharded: Annotated[
        bool, typer.Option("--unsharded", help="Put sharded arrays onto one device.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what SRC holds and what DST would be; write nothing."),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    """Converts a checkpoint of Linen into one of NNX, or one of NNX into one of Linen.

    SRC is an Orbax checkpoint (of a train state, of variables, of parameters; one step or a folder
    of steps, of which the last is taken), a file of `flax.serialization`, or the weights of a Flax
    model of Hugging Face. Which it is, and of which side, is found from what is in it.

        $ flaxlift convert runs/linen/1000 runs/nnx/1000

    A Linen train state becomes `{'model': ..., 'optimizer': ...}` with the states of an NNX model
    and its `nnx.Optimizer`, and the other fields beside them. Keys of random numbers go into a
    checkpoint of their own, `DST/rngs`. For the way to Linen DST may end in `.msgpack` or
    `.safetensors`.

    Exit status: 0 if DST was written, 2 if it was not; it is as it was then.
    """
    messages = Console(stderr=True)
    try:
        if not unsharded:
            _simulate_devices(source, item)
        with _progress(messages) as report:
            done = convert(
                source,
                destination,
                layout=layout,
                item=item,
                like=like,
                plan=None if plan is None else _read_plan(plan),
                unsharded=unsharded,
                force=force,
                dry_run=dry_run,
                progress=report,
            )
            if dry_run:
                Console().print(describe(source, layout=layout, item=item))
    except CheckpointError as error:
        if traceback:
            messages.print_exception()
        messages.print(Text.assemble(("error: ", "bold red"), str(error)))
        raise typer.Exit(2) from error
    Console().print(_summary(done))
    if dry_run:
        Console().print("nothing was written (--dry-run)")


def _read_plan(file: Path) -> Plan:
    try:
        return Plan.read(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is no plan: {error}") from error


def _simulate_devices(source: Path, item: str | None) -> None:
    """Lets the CPU stand for as many devices as the arrays of the checkpoint lie on."""
    devices = saved_devices(locate(source, item))
    if devices > 1:
        # Too late if JAX runs already; then what is missing is said where it is needed.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", devices)


@contextlib.contextmanager
def _progress(messages: Console) -> Iterator[Report]:
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=messages,
        transient=True,
        disable=not messages.is_terminal,
    )
    with progress:
        task = progress.add_task("reading", total=None)

        def report(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what[-40:])

        yield report


def _summary(done: Conversion) -> Table:
    table = Table(show_header=False, box=None)
    table.add_row("from", str(done.source), done.source_layout)
    table.add_row("to", str(done.destination), done.destination_layout)
    table.add_row("", f"{done.arrays} arrays, {decimal(done.nbytes)}", "")
    if done.apart:
        table.add_row("apart", ", ".join(done.apart), "random numbers, in rngs/")
    if done.suggested:
        hint = "the names suggest it; a Linen checkpoint of such a run, with --like, says it"
        table.add_row("structure", hint, "")
    return table

"""Checkpoints of Linen as checkpoints of NNX, and back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from nnx_bridge.checkpoints import _mapping, _plan, _structure
from nnx_bridge.checkpoints._entries import (
    CheckpointError,
    Path,
    below,
    is_empty,
    listed,
    loaded,
    written,
)
from nnx_bridge.checkpoints._layout import Layout, Linen, Nnx, find_layout, is_apart
from nnx_bridge.checkpoints._mapping import RNGS
from nnx_bridge.checkpoints._msgpack import write_msgpack
from nnx_bridge.checkpoints._names import VALUE
from nnx_bridge.checkpoints._orbax_writer import write_orbax
from nnx_bridge.checkpoints._publish import published, sweep
from nnx_bridge.checkpoints._safetensors import write_safetensors
from nnx_bridge.checkpoints._source import Source, open_source
from nnx_bridge.weights import Plan

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
      source: the checkpoint that was read.
      destination: the one that was written.
      source_layout: the layout that was found.
      destination_layout: the layout that was written.
      arrays: how many arrays.
      nbytes: their bytes.
      apart: the leaves of random numbers, which are in a checkpoint of their own below it.
      suggested: whether names alone said what a train state of Linen is made of; empty states at
        the end of its optimizer's chain are not in it then, and `like` would have them.
    """

    source: FilePath
    destination: FilePath
    source_layout: str
    destination_layout: str
    arrays: int
    nbytes: int
    apart: tuple[str, ...] = ()
    suggested: bool = False


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    layout: str | None = None,
    item: str | None = None,
    like: str | os.PathLike[str] | None = None,
    plan: Plan | None = None,
    unsharded: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> Conversion:
    """Writes a Linen checkpoint as an NNX one, or an NNX checkpoint as a Linen one.

    Use it once, when a run moves to the other side; `load_checkpoint` reads either kind without.
    Which kind the source is, is found from the names in it. A Linen train state becomes
    `{'model': nnx.state(model, nnx.Not(nnx.RngState)), 'optimizer': nnx.state(optimizer)}` with its
    other fields beside them, Linen variables alone become the state of the model. Arrays are read
    and written a few at a time, and lie on devices as they did.

    Random numbers are kept apart: keys of a train state, and the streams of an NNX model, go into a
    checkpoint of their own, the folder `rngs` in the destination. They come back on the way back.

    Args:
      source: An Orbax checkpoint, one item or step of one, a folder of steps (the last is taken), a
        file of `flax.serialization`, a safetensors file of a Flax model, or a folder of Hugging
        Face with one of them, in one or several files.
      destination: The folder of the new checkpoint, or a file that ends in `.msgpack`, or in
        `.safetensors` for parameters alone, for the way to Linen.
      layout: The layout of the source, where the names in it mislead; one of `LAYOUTS`.
      item: The item of the source, where there are several.
      like: For the way to Linen, a Linen checkpoint of the same run, whose structure the new one
        gets. Without it, that of the checkpoint that the source was converted from. Without that,
        one that the names suggest; what has left no trace in NNX, such as the empty state at the
        end of an optimizer's chain, is not in it then.
      plan: Where the NNX model has other names or shapes than Linen's: the plan of
        `nnx_bridge.match` or `load`. Moments and averages are converted by it too. By default an
        NNX path is the Linen path without its collection.
      unsharded: Whether arrays are read onto one device, however they were saved.
      force: Whether a destination that exists is replaced.
      dry_run: Only finds out what would be done, and writes nothing.
      progress: Called with the bytes done, all bytes, and what was done.

    Returns:
      What was done.

    Raises:
      CheckpointError: The source is damaged, foreign or of no known layout, the destination exists
        or cannot be written. The destination is then as it was.

    Example:
        >>> import tempfile, jax.numpy as jnp, orbax.checkpoint as ocp
        >>> folder = FilePath(tempfile.mkdtemp())
        >>> variables = {"params": {"Dense_0": {"kernel": jnp.ones((2, 3))}}}
        >>> ocp.PyTreeCheckpointer().save(folder / "linen", variables)
        >>> done = convert(folder / "linen", folder / "nnx")
        >>> done.source_layout, done.destination_layout, done.arrays
        ('variables', 'nnx_model', 1)
    """
    source, destination = FilePath(source).resolve(), FilePath(destination).absolute()
    if not dry_run:
        sweep(destination)
    _check_places(source, destination, force)
    opened = open_source(source, item=item, unsharded=unsharded)
    found = opened.layout(layout)
    if isinstance(found, Linen):
        made = _to_nnx(opened, found, plan)
    else:
        made = _to_linen(opened, found, plan, None if like is None else FilePath(like))
    total = sum(
        v.nbytes for v in (*made.entries.values(), *made.apart.values()) if hasattr(v, "nbytes")
    )
    done = 0

    def advance(nbytes: int, what: str) -> None:
        nonlocal done
        done += nbytes
        progress(done, total, what)

    if not dry_run:
        with published(destination, force) as place:
            _write(place, destination, made, advance)
    arrays = [v for v in made.entries.values() if hasattr(v, "nbytes")]
    return Conversion(
        opened.where,
        destination,
        found.name,
        made.layout.name,
        len(arrays),
        total,
        tuple(sorted(map(written, made.apart))),
        made.suggested,
    )


@dataclasses.dataclass(frozen=True)
class _Made:
    """A checkpoint that is to be written."""

    layout: Layout
    entries: dict[Path, Any]
    apart: dict[Path, Any]
    custom: dict[str, Any]
    suggested: bool = False


def _to_nnx(source: Source, layout: Linen, plan: Plan | None) -> _Made:
    entries = dict(source.entries)
    if layout.step is not None and layout.opt_state is not None:
        step = loaded(entries[layout.step])
        entries[layout.step] = _mapping.as_step(step, np.zeros((), np.uint32))
    where, made = _mapping.to_nnx(entries, layout, plan is not None)
    apart = {t[1:]: entries[p] for p, t in where.items() if t and t[0] == RNGS}
    result = {t: entries[p] for p, t in where.items() if t and t[0] != RNGS}
    if plan is not None:
        result = _plan.apply(plan, result, (VALUE,), made.model)
    # The streams of an NNX model that this checkpoint was made from.
    result.update({_in_model(p, made): leaf for p, leaf in source.apart.items()})
    custom = {
        "linen": _structure.remembered(source.entries, layout),
        "nnx": dataclasses.asdict(made),
    }
    return _Made(made, result, apart, custom)


def _to_linen(source: Source, layout: Nnx, plan: Plan | None, like: FilePath | None) -> _Made:
    entries = dict(source.entries)
    if like is not None:
        other = open_source(like, unsharded=True)
        linen = find_layout(other.entries)
        if not isinstance(linen, Linen):
            raise CheckpointError(
                f"like={like} is no Linen checkpoint (its layout is {linen.name})"
            )
        structure: dict[Path, Any] = other.entries
    elif "linen" in source.custom:
        structure, linen = _structure.recorded(source.custom["linen"])
    elif plan is not None:
        structure, linen = _structure.planned(plan, layout)
    else:
        structure, linen = _mapping.suggested(entries, layout)
    suggested = like is None and "linen" not in source.custom and linen.opt_state is not None
    result = _mapping.to_linen(entries, layout, structure, linen, plan)
    result.update({p: v for p, v in source.apart.items() if p in structure})
    used = set(map(id, result.values()))
    apart = {p: v for p, v in entries.items() if is_apart(p, v, layout) and id(v) not in used}
    streams = {_out_of_model(p, layout): v for p, v in apart.items()}
    return _Made(linen, result, streams, {}, suggested)


def _out_of_model(path: Path, layout: Nnx) -> Path:
    """The path of a stream as it is kept apart, the same for all layouts of NNX."""
    end: Path = (VALUE,) if layout.pure else ()
    if path[: len(layout.model)] == layout.model:
        path = ("model", *path[len(layout.model) :])
    return (*path, *end)


def _in_model(path: Path, layout: Nnx) -> Path:
    return (*layout.model, *path[1:]) if path[0] == "model" else path


def _check_places(source: FilePath, destination: FilePath, force: bool) -> None:
    resolved = destination.resolve()
    if resolved == source or source in resolved.parents or resolved in source.parents:
        raise CheckpointError(f"the destination {destination} and the source {source} overlap")
    if not destination.parent.is_dir():
        raise CheckpointError(f"{destination.parent}, where the checkpoint is to be, is no folder")
    if os.path.lexists(destination) and not force:
        raise CheckpointError(f"{destination} exists; force=True (--force) replaces it")


def _write(place: FilePath, destination: FilePath, made: _Made, advance: Any) -> None:
    suffix = destination.suffix
    if suffix not in (".msgpack", ".safetensors"):
        write_orbax(place, made.entries, {"flaxlift": made.custom}, advance)
        if made.apart:
            write_orbax(place / RNGS, made.apart, None, advance)
        return
    if not isinstance(made.layout, Linen):
        raise CheckpointError(
            f"{destination} would be a file of Linen weights, and the source is Linen; name a "
            "folder for the NNX checkpoint"
        )
    if suffix == ".msgpack":
        write_msgpack(place, made.entries, advance)
        return
    root = made.layout.collections["params"]
    beside = [p for p, v in made.entries.items() if p[: len(root)] != root and not is_empty(v)]
    if beside:
        raise CheckpointError(f"safetensors keeps parameters alone; there is also {listed(beside)}")
    write_safetensors(place, below(made.entries, root), advance)

"""Both sides in Linen's terms: a slot is one array that Linen has, or that a model wants of it.

The arrays of NNX are taken apart into those that Linen would have had (`Piece`), so that what
remains is to find, for each slot of NNX, the slot of Linen with the same shape and meaning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from lifted._errors import path_text
from nnx_bridge._collections import Path
from nnx_bridge.weights._layouts import Copy, Names
from nnx_bridge.weights._leaves import Leaf, Target
from nnx_bridge.weights._registry import Part, Parts, known_parts


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """Arrays of one NNX module, and how they are made of Linen's.

    Attributes:
      part: The layout, with paths within the module.
      targets: The arrays.
    """

    part: Part
    targets: tuple[Target, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """One array in Linen's terms.

    Attributes:
      path: `(*modules, name)`, without the collection.
      collection: The Linen collection.
      shape: Its shape; None for what is no array.
      dtype: Its dtype.
      names: The names of its axes.
      sources: On the side of Linen, the leaves that it is made of; on that of NNX, pieces with the
        place of the array among their Linen arrays. There are several for a list that is looked at
        as a stack.
      axis: The axis of that stack; None for what is no list.
      origin: Of such a list, the path of the array in the first layer.
      zone: The target of the user's rule that the slot falls under, which it must not leave.
    """

    path: Path
    collection: str
    shape: tuple[int, ...] | None
    dtype: str
    names: Names
    sources: tuple[Any, ...]
    axis: int | None = None
    origin: Path | None = None
    zone: Path | None = None

    @property
    def text(self) -> str:
        return path_text((self.collection, *self.path))


def linen_slot(leaf: Leaf, path: Path | None = None, zone: Path | None = None) -> Slot:
    """The slot of one Linen leaf, under another path where a rule has renamed it."""
    path = leaf.path[1:] if path is None else path
    collection = leaf.collection
    return Slot(path, collection, leaf.shape, leaf.dtype, leaf.names, (leaf,), zone=zone)


def nnx_slots(
    targets: Sequence[Target], classes: Mapping[Path, type], linen_paths: Iterable[Path]
) -> list[Slot]:
    """The slots of an NNX model."""
    linen = set(linen_paths)
    by_path = {target.path: target for target in targets}
    slots: list[Slot] = []
    for module in sorted(classes, key=len, reverse=True):
        choices = known_parts(classes[module])
        if not choices:
            continue
        inside = {p[len(module) :]: t for p, t in by_path.items() if p[: len(module)] == module}
        for part in _chosen(choices, inside, linen):
            taken = tuple(by_path.pop((*module, *path)) for path in part.nnx)
            slots.extend(_slots_of(module, Piece(part, taken)))
    for path, target in by_path.items():
        name = path[-1] if target.linen_name is None else target.linen_name
        part = Part(((name,),), ((path[-1],),), collection=target.collection)
        slots.extend(_slots_of(path[:-1], Piece(part, (target,))))
    return slots


def _chosen(
    choices: Sequence[Parts], inside: Mapping[Path, Target], linen: set[Path]
) -> list[Part]:
    """The parts of the first choice whose arrays Linen has somewhere, together."""
    numbers = {p: t for p, t in inside.items() if t.shape is not None and t.dtype[:4] != "key<"}
    shapes = {path: target.abstract for path, target in numbers.items()}
    expansions = [list(parts(shapes)) for parts in choices]
    for parts in expansions:
        if _somewhere([path for part in parts for path in part.linen], linen):
            return parts
    # The same arrays in Linen as in NNX: nothing to take apart.
    changed = [p for parts in expansions for part in parts for p in part.nnx]
    return [] if _somewhere(changed, linen) else expansions[0]


def _somewhere(paths: Sequence[Path], linen: set[Path]) -> bool:
    """Whether Linen has all `paths` under one module."""
    if not paths:
        return False
    first, *others = paths
    n = len(first)
    return any(
        all((*path[:-n], *other) in linen for other in others)
        for path in linen
        if path[-n:] == first
    )


def _slots_of(module: Path, piece: Piece) -> Iterable[Slot]:
    part, targets = piece.part, piece.targets
    if isinstance(part.layout, Copy):
        arrays: list[Any] = [(t.shape, t.dtype) for t in targets]
        names = [t.names for t in targets]
    else:
        shapes = jax.eval_shape(lambda xs: part.layout.to_linen(xs), [t.abstract for t in targets])
        arrays = [(tuple(x.shape), str(x.dtype)) for x in shapes]
        names = [None] * len(arrays)
    collection = part.collection or targets[0].collection
    for i, (path, (shape, dtype)) in enumerate(zip(part.linen, arrays, strict=True)):
        yield Slot((*module, *path), collection, shape, dtype, names[i], ((piece, i),))

"""Both sides in Linen's terms: a slot is one array that Linen has, or that a model wants of it.

The arrays of NNX are taken apart into those that Linen would have had (`Piece`), so that what
remains is to find, for each slot of NNX, the slot of Linen with the same shape and meaning.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lifted._errors import path_text
from nnx_bridge._collections import Path
from nnx_bridge._names import linen_names
from nnx_bridge.weights._layouts import Copy, Layout, Names
from nnx_bridge.weights._leaves import Leaf, Target
from nnx_bridge.weights._registry import Part, Parts, Shapes, known_parts
from nnx_bridge.weights._stacked import Stacked

Shape = tuple[int, ...] | None  # None for what is no array.


class Level(NamedTuple):
    """One level of a stack: how many layers, and the axis that tells them apart."""

    length: int
    axis: int


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
      stack: The levels of that stack, the outermost first; empty for what is no list.
      layer: Of such a list, the shape that the array has in each layer.
      origin: The same for its path in the first layer.
      zone: The target of the user's rule that the slot falls under, which it must not leave.
    """

    path: Path
    collection: str
    shape: Shape
    dtype: str
    names: Names
    sources: tuple[Any, ...]
    stack: tuple[Level, ...] = ()
    layer: Shape = None
    origin: Path | None = None
    zone: Path | None = None

    @property
    def text(self) -> str:
        return path_text((self.collection, *self.path))

    def layer_of(self, stack: tuple[Level, ...]) -> Shape:
        """The shape of one layer, where the array is a stack of such levels, or None."""
        return self.layer if self.stack else layer_shape(self.shape, stack)


def layer_shape(shape: Shape, stack: Iterable[Level]) -> Shape:
    """A shape without the axes of a stack; None where it has no such axes of these lengths."""
    for length, axis in stack:
        if shape is None or not -len(shape) <= axis < len(shape) or shape[axis] != length:
            return None
        axis %= len(shape)
        shape = (*shape[:axis], *shape[axis + 1 :])
    return shape


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
    expansions = [_expanded(parts, shapes) for parts in choices]
    for parts in expansions:
        if _somewhere([path for part in parts for path in part.linen], linen):
            return parts
    # The same arrays in Linen as in NNX: nothing to take apart.
    changed = [p for parts in expansions for part in parts for p in part.nnx]
    return [] if _somewhere(changed, linen) else expansions[0]


def _expanded(parts: Parts, shapes: Shapes) -> list[Part]:
    """The parts of a layer, or of a stack of layers.

    Layouts count axes from the end, so those of one layer are those of a stack along its first
    axis too. Along other axes each layer is taken by itself.
    """
    for stack in ((), *_stacks(shapes)):
        layers = {p: layer_shape(x.shape, stack) for p, x in shapes.items()}
        if not all(layers.values()) and stack:
            continue
        abstract = {p: jax.ShapeDtypeStruct(layers[p] or (), x.dtype) for p, x in shapes.items()}
        found = list(parts(abstract))
        if all(_applies(part, abstract) for part in found):
            return [dataclasses.replace(part, layout=_of(part.layout, stack)) for part in found]
    return []


def _stacks(shapes: Shapes) -> Iterator[tuple[Level, ...]]:
    """The stacks, also of stacks, that an array of the smallest rank may be."""
    smallest = min((x.shape for x in shapes.values()), key=len, default=())
    rank = len(smallest)
    for depth, from_end in itertools.product((1, 2), (False, True)):
        for axes in itertools.product(range(-rank, 0) if from_end else range(rank), repeat=depth):
            stack: tuple[Level, ...] = ()
            for axis in axes:
                shape = layer_shape(smallest, stack) or ()
                if -len(shape) <= axis < len(shape):
                    stack = (*stack, Level(shape[axis], axis))
            if len(stack) == depth:
                yield stack


def _applies(part: Part, shapes: Shapes) -> bool:
    try:
        _linen_shapes(part, [shapes[path] for path in part.nnx])
    except ValueError:  # Such as gates that are not as wide as the array.
        return False
    return True


def _linen_shapes(part: Part, values: Sequence[Any]) -> list[Any]:
    return jax.eval_shape(lambda xs: part.layout.to_linen(xs), list(values))


def _of(layout: Layout, stack: tuple[Level, ...]) -> Layout:
    """A layout for each layer of stacks that lie alike on both sides."""
    for length, axis in reversed(stack):
        layout = Stacked(layout, length, linen_axis=axis, nnx_axis=axis)
    return layout


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
        shapes = _linen_shapes(part, [t.abstract for t in targets])
        arrays = [(tuple(x.shape), str(x.dtype)) for x in shapes]
        names = [None] * len(arrays)
    collection = part.collection or targets[0].collection
    for i, (path, (shape, dtype)) in enumerate(zip(part.linen, arrays, strict=True)):
        yield Slot((*linen_names(module), *path), collection, shape, dtype, names[i], ((piece, i),))

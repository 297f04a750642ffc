"""What is assigned together: the arrays of a module, or a single one; and what such units share."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

from nnx_bridge._collections import Path
from nnx_bridge.weights._layouts import Copy, Layout
from nnx_bridge.weights._paths import canonical, leaf_name
from nnx_bridge.weights._similarity import alike
from nnx_bridge.weights._slots import Slot

Unit = list[Slot]


def path_of(unit: Unit) -> Path:
    """The path that a unit is compared by; of a list looked at as a stack, that of its first."""
    return unit[0].origin or unit[0].path


def modules(slots: Iterable[Slot]) -> list[Unit]:
    """The arrays of each module together."""
    units: dict[Hashable, Unit] = defaultdict(list)
    for slot in slots:
        units[slot.zone, module_of(slot)].append(slot)
    return list(units.values())


def module_of(slot: Slot) -> Hashable:
    """The name of the module that an array is in."""
    return canonical(slot.path)[:-1]


def partners(ours: Unit, theirs: Unit) -> list[tuple[Slot, Slot]]:
    """The arrays of two modules by their names; of single arrays these two."""
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    named = {(slot.collection, canonical(slot.path)[-1:]): slot for slot in theirs}
    return [(slot, named[slot.collection, canonical(slot.path)[-1:]]) for slot in ours]


def by_shapes(unit: Unit) -> Hashable:
    """What modules have in common whose arrays can be each other's: names and shapes."""
    names = ((slot.collection, canonical(slot.path)[-1:], slot.shape) for slot in unit)
    return unit[0].zone, frozenset(names)


def by_sizes(unit: Unit) -> Hashable:
    """The same of modules whose arrays may lie differently."""
    names = (
        (slot.collection, canonical(slot.path)[-1:], slot.shape and math.prod(slot.shape))
        for slot in unit
    )
    return unit[0].zone, frozenset(names)


def singles(slots: Iterable[Slot]) -> list[Unit]:
    """Each array by itself."""
    return [[slot] for slot in slots]


def by_size(unit: Unit) -> Hashable:
    """What single arrays have in common that may lie differently."""
    (slot,) = unit
    return slot.zone, slot.collection, slot.shape and math.prod(slot.shape)


def by_kind(units: list[Unit], kind: Callable[[Unit], Hashable]) -> dict[Hashable, list[Unit]]:
    """The units of each kind."""
    kinds: dict[Hashable, list[Unit]] = defaultdict(list)
    for unit in units:
        kinds[kind(unit)].append(unit)
    return kinds


def by_name(ours: Slot, theirs: Slot) -> Layout | None:
    """A copy, where the names of two arrays do not speak against it."""
    likeness = alike(leaf_name(ours.path[-1]), leaf_name(theirs.path[-1]))
    return Copy() if likeness > 0 else None


def is_merged(shape: Sequence[int], into: Sequence[int]) -> bool:
    """Whether `into` is `shape` with neighbouring axes merged."""
    ends = {math.prod(shape[:i]) for i in range(len(shape) + 1)}
    return len(into) < len(shape) and all(math.prod(into[:i]) in ends for i in range(len(into) + 1))


def leaf_paths(slot: Slot) -> list[Path]:
    """The paths of the arrays that a slot stands for, in Linen or in NNX."""
    paths: list[Path] = []
    for source in slot.sources:
        paths += [t.path for t in source[0].targets] if isinstance(source, tuple) else [source.path]
    return paths

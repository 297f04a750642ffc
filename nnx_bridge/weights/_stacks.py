"""Lists of layers on one side that are a stack on the other, as `nn.scan` and `nnx.vmap` make them.

A list has equal layers under numbered paths; the stack has the arrays of one layer, with one more
axis as long as the list, and a list of lists those with two. Such a list is looked at as a stack
where its arrays have no equal on the other side and the stacked ones do, apart from a layout that
each layer may have. The axis follows from the shapes of all arrays together, or from the names of
axes; where it does not, it is asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nnx_bridge.weights._layouts import Layout
from nnx_bridge.weights._lists import Layers, lists
from nnx_bridge.weights._slots import Level, Shape, Slot, layer_shape

Signature = tuple[Any, ...]
Axes = tuple[int, ...]  # Of each level, the outermost first.
Given = int | Mapping[str, int] | None
# A layout between a slot of the side with lists, a shape of its layer, one of the other side, and a
# shape of its layer.
Layouts = Callable[[Slot, Shape, Slot, Shape], Layout | None]

# Lists of lists are looked at down to this depth.
_DEPTH = 3


@dataclasses.dataclass(frozen=True)
class UnknownAxis:
    """A list whose stack may have any of several axes.

    Attributes:
      where: The path of the list, without numbers; and those of the lists in it.
      slots: Its arrays.
      axes: The axes that fit.
      stacks: The signatures that its stack may have on the other side.
    """

    where: tuple[str, ...]
    slots: tuple[Slot, ...]
    axes: tuple[Axes, ...]
    stacks: frozenset[Signature]


def signature(slot: Slot) -> Signature:
    """What equal arrays have in common. Their dtype is checked later, so that it can be named."""
    return (slot.zone, slot.collection, slot.shape)


def collapse(
    slots: Sequence[Slot],
    others: Sequence[Slot],
    layouts: Layouts,
    kind: Callable[[Slot], Any],
    axis: Given = None,
) -> tuple[list[Slot], list[UnknownAxis]]:
    """The slots, with lists turned into stacks where the other side has stacks.

    Args:
      slots: Those of the side that may have lists.
      others: Those of the other side.
      layouts: How a layer of a list may become one of a stack.
      kind: What slots have in common that have the same layouts.
      axis: The axis of all stacks, or of some by the path of their list.

    Returns:
      The slots, and the lists whose axis is not known.
    """
    return _Collapse(slots, others, layouts, kind, axis).run()


class _Collapse:
    def __init__(
        self,
        slots: Sequence[Slot],
        others: Sequence[Slot],
        layouts: Layouts,
        kind: Callable[[Slot], Any],
        given: Given,
    ) -> None:
        self._slots = dict.fromkeys(slots)
        self._layouts = layouts
        self._given = given
        self._have = Counter(map(signature, slots))
        self._want = Counter(map(signature, others))
        # Of others that are alike, one.
        alike: dict[Any, dict[Any, tuple[Slot, int]]] = defaultdict(dict)
        for other in others:
            size = _size(other)
            _, count = alike[size].get(kind(other), (other, 0))
            alike[size][kind(other)] = other, count + 1
        self._others = {size: list(kinds.values()) for size, kinds in alike.items()}

    def run(self) -> tuple[list[Slot], list[UnknownAxis]]:
        stacks: list[Slot] = []
        unknown: list[UnknownAxis] = []
        found = bool(self._others)
        # What is beside the lists in a list may be a stack too, once these are gone.
        while found:
            found = False
            for depth in range(1, _DEPTH + 1):
                for layers in lists(list(self._slots), depth, signature):
                    fitting = self._fitting(layers)
                    if not fitting:
                        continue
                    found = True
                    for slot in layers.slots:
                        del self._slots[slot]
                    self._have -= Counter(map(signature, layers.slots))
                    if len(fitting) == 1:
                        (axes,) = fitting
                        new = [_stacked(slots, layers, axes) for slots in layers.arrays]
                        self._have.update(map(signature, new))
                        stacks += new
                    else:
                        unknown.append(
                            UnknownAxis(
                                layers.where,
                                layers.slots,
                                tuple(sorted(fitting)),
                                frozenset().union(*fitting.values()),
                            )
                        )
        return [*self._slots, *stacks], unknown

    def _fitting(self, layers: Layers) -> dict[Axes, set[Signature]]:
        """The axes along which all arrays of a layer are stacked on the other side, and as what."""
        # Of nested lists the outer one comes first.
        if not all(slot in self._slots for slot in layers.slots):
            return {}
        first = [slots[0] for slots in layers.arrays]
        if any(self._have[signature(slot)] <= self._want[signature(slot)] for slot in first):
            return {}
        # Lists on both sides, of which only the layout differs.
        if all(map(self._has_partners, first)):
            return {}
        # Counted from the end, an axis is another one in kernels and in biases.
        return self._common(first, layers, False) or self._common(first, layers, True)

    def _common(
        self, first: Sequence[Slot], layers: Layers, from_end: bool
    ) -> dict[Axes, set[Signature]]:
        """The axes along which all arrays of the first layer may be stacked."""
        # Without the list: its kernels may have the shape of its stacked biases.
        have = self._have - Counter(map(signature, layers.slots))
        common: dict[Axes, set[Signature]] | None = None
        for slot in first:
            fitting: dict[Axes, set[Signature]] = defaultdict(set)
            for axes, other in self._stacks_of(slot, layers, have, from_end):
                fitting[axes].add(signature(other))
            if common is None:
                common = fitting
            else:
                common = {a: common[a] | fitting[a] for a in common if a in fitting}
            if not common:
                return {}
        return common or {}

    def _stacks_of(
        self, slot: Slot, layers: Layers, have: Mapping[Signature, int], from_end: bool
    ) -> Iterator[tuple[Axes, Slot]]:
        """Axes, and arrays of the other side that along them have the layers of a list."""
        count = math.prod(layers.counts)
        for other, _ in self._others.get(_size(slot, count), ()):
            free = self._want[signature(other)] > have[signature(other)]
            for axes, inner in self._unstacked(other.shape, layers, from_end):
                if slot.shape == inner:
                    fits = free and _may_be(slot, axes, other)
                else:
                    fits = self._layouts(slot, slot.shape, other, inner) is not None
                if fits:
                    yield axes, other

    def _unstacked(
        self, shape: Shape, layers: Layers, from_end: bool
    ) -> Iterator[tuple[Axes, Shape]]:
        """The shapes of one layer that arrays of a shape may have, and the axes of the stacks."""
        ndim = len(shape or ())
        choices = []
        for depth, where in enumerate(layers.where):
            given = self._given if isinstance(self._given, int) else (self._given or {}).get(where)
            known = range(depth - ndim, 0) if from_end else range(ndim - depth)
            choices.append(known if given is None else (given,))
        for axes in itertools.product(*choices):
            inner = layer_shape(shape, tuple(map(Level, layers.counts, axes)))
            if inner is not None:
                yield axes, inner

    def _has_partners(self, slot: Slot) -> bool:
        """Whether the other side has as many arrays that fit without being a stack."""
        partners = sum(
            count
            for other, count in self._others.get(_size(slot), ())
            if self._layouts(slot, slot.shape, other, other.shape) is not None
        )
        return self._have[signature(slot)] <= partners


def _size(slot: Slot, count: int = 1) -> Any:
    size = None if slot.shape is None else count * math.prod(slot.shape)
    return slot.zone, slot.collection, size


def _may_be(slot: Slot, axes: Axes, stacked: Slot) -> bool:
    """Whether names of axes, where both sides have them, are those of a stack along `axes`."""
    names, theirs = slot.names, stacked.names
    if names is None or theirs is None or len(theirs) != len(names) + len(axes):
        return True
    for axis in axes:
        axis %= len(theirs)
        theirs = (*theirs[:axis], *theirs[axis + 1 :])
    return theirs == tuple(names)


def _stacked(slots: Sequence[Slot], layers: Layers, axes: Axes) -> Slot:
    """The stack of the same array of each layer."""
    first = slots[0]
    shape, names = first.shape, first.names
    assert shape is not None  # What is no array is in no list, see `_unstacked`.
    for count, axis in reversed(list(zip(layers.counts, axes, strict=True))):
        # Where the stack has more axes in each layer than the list, `layer` tells the shape.
        at = axis % (len(shape) + 1) if axis < 0 else min(axis, len(shape))
        shape = (*shape[:at], count, *shape[at:])
        names = names and (*names[:at], None, *names[at:])
    return dataclasses.replace(
        first,
        shape=shape,
        names=names,
        path=layers.path_of(first),
        sources=tuple(source for slot in slots for source in slot.sources),
        stack=tuple(map(Level, layers.counts, axes)),
        layer=first.shape,
        origin=first.path,
    )

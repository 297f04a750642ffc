"""Lists of layers on one side that are a stack on the other, as `nn.scan` and `nnx.vmap` make them.

A list has equal layers under numbered paths; the stack has the arrays of one layer, with one more
axis as long as the list. Such a list is looked at as a stack where its arrays have no equal on the
other side and the stacked ones do. The axis follows from the shapes of all arrays together, or from
the names of axes; where it does not, it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lifted._errors import path_text
from nnx_bridge._collections import Path
from nnx_bridge.weights._layouts import Names
from nnx_bridge.weights._paths import canonical, tokens
from nnx_bridge.weights._slots import Slot

Signature = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class UnknownAxis:
    """A list whose stack may have any of several axes.

    Attributes:
      where: The path of the list, without numbers.
      slots: Its arrays.
      axes: The axes that fit.
      stacks: The signatures that its stack may have on the other side.
    """

    where: str
    slots: tuple[Slot, ...]
    axes: tuple[int, ...]
    stacks: frozenset[Signature]


def signature(slot: Slot) -> Signature:
    """What equal arrays have in common. Their dtype is checked later, so that it can be named."""
    return (slot.zone, slot.collection, slot.shape)


def collapse(
    slots: Sequence[Slot], others: Sequence[Slot], axis: int | Mapping[str, int] | None = None
) -> tuple[list[Slot], list[UnknownAxis]]:
    """The slots, with lists turned into stacks where the other side has stacks.

    Args:
      slots: Those of the side that may have lists.
      others: Those of the other side.
      axis: The axis of all stacks, or of some by the path of their list.

    Returns:
      The slots, and the lists whose axis is not known.
    """
    have, want = Counter(map(signature, slots)), Counter(map(signature, others))
    names = defaultdict(set)
    for other in others:
        names[signature(other)].add(other.names)
    remaining = dict.fromkeys(slots)
    unknown: list[UnknownAxis] = []
    stacks: list[Slot] = []
    for where, layers in _lists(slots):
        members = [slot for layer in layers for slot in layer.values()]
        # Of nested lists the outer one comes first.
        if not all(slot in remaining for slot in members):
            continue
        first = list(layers[0].values())
        if any(have[signature(slot)] <= want[signature(slot)] for slot in first):
            continue
        given = axis if axis is None or isinstance(axis, int) else axis.get(where)
        # Without the list: its kernels may have the shape of its stacked biases.
        others_ = have - Counter(map(signature, members))
        axes = _axes(first, len(layers), others_, want, names, given)
        if not axes:
            continue
        have = others_
        for slot in members:
            del remaining[slot]
        if len(axes) == 1:
            new = [_stacked([layer[rest] for layer in layers], *axes) for rest in layers[0]]
            have.update(map(signature, new))
            stacks += new
        else:
            unknown.append(_unknown(where, layers, axes))
    return [*remaining, *stacks], unknown


def _unknown(where: str, layers: list[dict[Any, Slot]], axes: set[int]) -> UnknownAxis:
    lists = [[layer[rest] for layer in layers] for rest in layers[0]]
    stacks = frozenset(signature(_stacked(slots, axis)) for slots in lists for axis in axes)
    members = tuple(slot for slots in lists for slot in slots)
    return UnknownAxis(where, members, tuple(sorted(axes)), stacks)


def _lists(slots: Sequence[Slot]) -> list[tuple[str, list[dict[Any, Slot]]]]:
    """The lists of equal layers, outer ones first: their paths and, by index, their arrays."""
    members: dict[Any, dict[int, dict[Any, Slot]]] = defaultdict(lambda: defaultdict(dict))
    texts: dict[Any, str] = {}
    for slot in slots:
        found, name = tokens(slot.path), canonical(slot.path)
        for depth, token in enumerate(found):
            start = found[depth - 1].end if depth else 0
            for k, index in enumerate(token.numbers):
                key = (depth, k, name[:depth], token.name, token.numbers[:k])
                rest = (slot.collection, token.numbers[k + 1 :], name[depth + 1 :])
                members[key][index][rest] = slot
                texts[key] = path_text((*slot.path[:start], _unnumbered(slot.path[start])))
    lists = []
    for key in sorted(members, key=lambda key: key[:2]):
        layers = [members[key][index] for index in sorted(members[key])]
        shapes = [{rest: signature(slot) for rest, slot in layer.items()} for layer in layers]
        if all(layer == shapes[0] for layer in shapes):
            lists.append((texts[key], layers))
    return lists


def _unnumbered(part: Any) -> str:
    return str(part).rstrip("_0123456789")


def _axes(
    layer: Sequence[Slot],
    count: int,
    have: Mapping[Any, int],
    want: Mapping[Any, int],
    names: Mapping[Any, set[Names]],
    given: int | None,
) -> set[int]:
    """The axes along which all arrays of a layer are stacked on the other side."""
    common: set[int] | None = None
    for slot in layer:
        if slot.shape is None:
            return set()
        ndim = len(slot.shape)
        fitting = set()
        for axis in range(ndim + 1) if given is None else (given % (ndim + 1),):
            stacked = (slot.zone, slot.collection, _inserted(slot.shape, axis, count))
            if want[stacked] > have[stacked] and any(
                _may_be(slot.names, axis, other) for other in names[stacked]
            ):
                # An axis that is given from the end is another one in each array.
                fitting.add(axis if given is None else given)
        common = fitting if common is None else common & fitting
    return common or set()


def _may_be(names: Names, axis: int, stacked: Names) -> bool:
    """Whether names of axes, where both sides have them, are those of a stack along `axis`."""
    if names is None or stacked is None or len(stacked) != len(names) + 1:
        return True
    return (*stacked[:axis], *stacked[axis + 1 :]) == tuple(names)


def _inserted(shape: tuple[int, ...], axis: int, count: int) -> tuple[int, ...]:
    return (*shape[:axis], count, *shape[axis:])


def _stacked(slots: Sequence[Slot], axis: int) -> Slot:
    """The stack of the same array of each layer."""
    first = slots[0]
    assert first.shape is not None  # What is no array is in no list, see `_axes`.
    axis %= len(first.shape) + 1
    sources = tuple(source for slot in slots for source in slot.sources)
    return dataclasses.replace(
        first,
        shape=_inserted(first.shape, axis, len(slots)),
        names=first.names and (*first.names[:axis], None, *first.names[axis:]),
        path=_without_number(slots),
        sources=sources,
        axis=axis,
        origin=first.path,
    )


def _without_number(slots: Sequence[Slot]) -> Path:
    """The path of the first slot without the number in which it differs from the last."""
    first, last = slots[0].path, slots[-1].path
    at = next((i for i, (a, b) in enumerate(zip(first, last, strict=True)) if a != b), None)
    if at is None:  # A list of one.
        at = next(i for i, token in enumerate(tokens(first)) if token.numbers)
        at = tokens(first)[at].end - 1
    if isinstance(first[at], int) or str(first[at]).isdigit():
        return (*first[:at], *first[at + 1 :])
    return (*first[:at], _unnumbered(first[at]), *first[at + 1 :])

"""Rows from pairs: what belongs to the same arrays of NNX comes together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from lifted._errors import path_text
from nnx_bridge.weights._layouts import Absent, Copy, Layout
from nnx_bridge.weights._pairs import Pair
from nnx_bridge.weights._problems import Undecided
from nnx_bridge.weights._row import Certainty, Row
from nnx_bridge.weights._slots import Level, Piece, layer_shape
from nnx_bridge.weights._stacked import Stacked


def assembled(pairs: Iterable[Pair]) -> tuple[list[Row], list[Undecided]]:
    """The rows of pairs, and the arrays of NNX of which only a part was found."""
    groups: dict[tuple[int, ...], dict[int, Pair]] = {}
    for pair in pairs:
        # A slot of NNX has the same place in all pieces that it stands for.
        key = tuple(id(piece) for piece, _ in pair.nnx.sources)
        groups.setdefault(key, {})[pair.nnx.sources[0][1]] = pair
    rows, incomplete = [], []
    for group in groups.values():
        pieces = [piece for piece, _ in next(iter(group.values())).nnx.sources]
        wanted = pieces[0].part.linen
        if len(group) == len(wanted):
            rows.append(_row([group[i] for i in range(len(wanted))], pieces))
        else:
            incomplete.append(_incomplete(group, pieces))
    return rows, incomplete


def _row(pairs: list[Pair], pieces: list[Piece]) -> Row:
    first = pairs[0]
    # One of both sides may be a list, whose layers come one after the other.
    lists = [[pair.linen.sources[i] for pair in pairs] for i in range(len(first.linen.sources))]
    order = list(Certainty)
    worst = max(pairs, key=lambda pair: order.index(pair.certainty))
    layout = pieces[0].part.layout if isinstance(first.layout, Copy) else first.layout
    layout = _sized(layout, lists[0][0], first.nnx.stack)
    # The side that is looked at as a stack is the list.
    ours, theirs = bool(first.linen.stack), bool(first.nnx.stack)
    for depth, (length, axis) in enumerate(first.linen.stack):
        # The layout of a stack along other than its first axis is that of each layer, see `_slots`.
        if isinstance(layout, Stacked) and layout.nnx_axis is not None:
            rank = len(pieces[0].targets[0].shape or ()) - depth
            if (length, axis % rank) == (layout.count, layout.nnx_axis % rank):
                layout = layout.layout
    for length, axis in reversed(first.linen.stack or first.nnx.stack):
        layout = Stacked(layout, length, None if ours else axis, None if theirs else axis)
    return Row(
        linen=tuple(leaf.path for leaves in lists for leaf in leaves),
        nnx=tuple(target.path for piece in pieces for target in piece.targets),
        layout=layout,
        certainty=worst.certainty,
        why=worst.why,
    )


def _sized(layout: Layout, leaf: Any, stack: tuple[Level, ...]) -> Layout:
    """What is absent in NNX has the shape that one layer of Linen has."""
    if not isinstance(layout, Absent):
        return layout
    return dataclasses.replace(layout, shape=layer_shape(leaf.shape, stack) or (), dtype=leaf.dtype)


def _incomplete(group: dict[int, Pair], pieces: list[Piece]) -> Undecided:
    part = pieces[0].part
    missing = [path_text(path) for i, path in enumerate(part.linen) if i not in group]
    found = [source.path for pair in group.values() for source in pair.linen.sources]
    targets = [target.path for piece in pieces for target in piece.targets]
    why = (
        f"of the {len(part.linen)} arrays that these are made of, {', '.join(missing)} are missing"
    )
    return Undecided(tuple(found), tuple(targets), why)

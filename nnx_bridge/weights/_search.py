"""The search for partners, by evidence in the order of its weight.

First equal paths. Then lists of layers are looked at as stacks where the other side has stacks.
Then modules are assigned to modules with arrays of the same names and shapes, by the likeness of
their paths and, where it is known, the order in which they are used. Then single arrays: to those
of the same shape, and to those whose shape follows by a transposition or by merging axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping

import numpy as np

from nnx_bridge._collections import Path
from nnx_bridge.weights._assign import FORBIDDEN, assign
from nnx_bridge.weights._fits import Fits
from nnx_bridge.weights._layouts import Copy, Layout
from nnx_bridge.weights._order import Orders
from nnx_bridge.weights._pairs import SCATTERED, SQUARE, Pair, scattered, squares
from nnx_bridge.weights._paths import canonical
from nnx_bridge.weights._problems import Undecided
from nnx_bridge.weights._row import Certainty
from nnx_bridge.weights._similarity import similarities, words
from nnx_bridge.weights._slots import Slot
from nnx_bridge.weights._stacks import UnknownAxis, collapse, signature
from nnx_bridge.weights._units import (
    Unit,
    by_kind,
    by_name,
    by_shapes,
    by_size,
    by_sizes,
    leaf_paths,
    modules,
    partners,
    path_of,
    singles,
)

# How much numbers count beside the names before them.
_NUMBER = 0.5
_NUMBER_BESIDE_ORDER = 0.05
# How much the order of use counts beside the likeness of paths.
_ORDER = 0.1
# From this likeness on it is the names that speak for a pair.
_ALIKE = 0.5
_RULE = "equally good for all that is known: write a rule"
_ADVICE = f"{_RULE}, or pass calls=(Linen's, NNX's) so that the order of use decides"


class Search:
    """Slots of both sides that have no partner yet, and what was found.

    Attributes:
      pairs: Partners.
      undecided: Groups among which nobody can decide.
    """

    def __init__(
        self,
        linen: Iterable[Slot],
        nnx: Iterable[Slot],
        classes: Mapping[Path, type],
        orders: Orders | None,
    ) -> None:
        self.pairs: list[Pair] = []
        self.undecided: list[Undecided] = []
        self._linen = dict.fromkeys(linen)
        self._nnx = dict.fromkeys(nnx)
        self._classes = classes
        self._fits = Fits(classes)
        self._orders = orders

    def run(self, stack_axis: int | Mapping[str, int] | None) -> None:
        """Finds partners for as many slots as possible."""
        self._same_paths(lambda path: path)
        self._same_paths(canonical)
        self._collapse(stack_axis)
        self._same_paths(canonical)
        self._same_paths_of_other_layout()
        self._assign(modules, by_shapes, None)
        self._assign(modules, by_sizes, self._fits.between)
        self._assign(singles, lambda unit: signature(unit[0]), by_name)
        self._assign(singles, by_size, self._fits.between)
        self._different_shapes()
        self._doubt()

    def _same_paths(self, name: Callable[[Path], Hashable]) -> None:
        """Pairs slots of the same path, collection and shape."""

        def keys(slots: Iterable[Slot]) -> dict[Slot, Hashable]:
            return {slot: (slot.collection, slot.shape, name(slot.path)) for slot in slots}

        ours, theirs = keys(self._linen), keys(self._nnx)
        counts = Counter(ours.values()), Counter(theirs.values())
        partners = {key: slot for slot, key in theirs.items()}
        for slot, key in ours.items():
            if counts[0][key] == counts[1][key] == 1:
                self._pair(Pair(slot, partners[key], Certainty.EQUAL))

    def _same_paths_of_other_layout(self) -> None:
        """Pairs slots of the same path whose arrays lie otherwise."""
        theirs: dict[Hashable, list[Slot]] = defaultdict(list)
        for slot in self._nnx:
            theirs[slot.zone, slot.collection, canonical(slot.path)].append(slot)
        for slot in list(self._linen):
            partners = theirs.get((slot.zone, slot.collection, canonical(slot.path)), [])
            how = self._fits.between(slot, partners[0]) if len(partners) == 1 else None
            if how is not None:
                self._pair(Pair(slot, partners.pop(), Certainty.EQUAL, layout=how))

    def _pair(self, pair: Pair) -> None:
        if pair.linen.zone is not None:
            pair = dataclasses.replace(pair, certainty=Certainty.RULE)
        self.pairs.append(pair)
        del self._linen[pair.linen], self._nnx[pair.nnx]

    def _collapse(self, axis: int | Mapping[str, int] | None) -> None:
        """Looks at lists as stacks."""
        ours, kind, layout = list(self._linen), self._fits.kind, self._fits.of_layers
        nnx, lists_of_nnx = collapse(
            list(self._nnx), ours, lambda x, a, y, b: layout(y, b, x, a), kind, axis
        )
        linen, lists_of_linen = collapse(ours, nnx, layout, kind, axis)
        self._nnx, self._linen = dict.fromkeys(nnx), dict.fromkeys(linen)
        for unknown in lists_of_nnx:
            self._undecide(_taken(self._linen, unknown), unknown.slots, _which_axis(unknown))
        for unknown in lists_of_linen:
            self._undecide(unknown.slots, _taken(self._nnx, unknown), _which_axis(unknown))

    def _undecide(self, linen: Iterable[Slot], nnx: Iterable[Slot], why: str) -> None:
        ours = [source.path for slot in linen for source in slot.sources]
        theirs = [t.path for slot in nnx for piece, _ in slot.sources for t in piece.targets]
        self.undecided.append(Undecided(tuple(ours), tuple(dict.fromkeys(theirs)), why))

    def _assign(
        self,
        units_of: Callable[[Iterable[Slot]], list[Unit]],
        kind: Callable[[Unit], Hashable],
        layout: Callable[[Slot, Slot], Layout | None] | None,
    ) -> None:
        """Assigns units of one kind to each other."""
        ours, theirs = by_kind(units_of(self._linen), kind), by_kind(units_of(self._nnx), kind)
        for key in ours:
            if key in theirs:
                self._assign_block(ours[key], theirs[key], layout)

    def _assign_block(
        self,
        ours: list[Unit],
        theirs: list[Unit],
        layout: Callable[[Slot, Slot], Layout | None] | None,
    ) -> None:
        leaf = all(len(unit) == 1 for unit in (*ours, *theirs))
        sides = (
            words([path_of(unit) for unit in ours], {}, leaf=leaf),
            words([path_of(unit) for unit in theirs], self._classes, leaf=leaf),
        )
        # Linen numbers its layers as they are made. How they are used says more, where it is known.
        number = _NUMBER if self._orders is None else _NUMBER_BESIDE_ORDER
        likeness = similarities(*sides, number)
        rivals = _rivals(similarities(*sides, 0.0))
        cost = 1 - likeness
        if self._orders is not None:
            first, second = self._ranks(0, ours), self._ranks(1, theirs)
            distance = np.abs(np.subtract.outer(first, second))
            cost += _ORDER * ((distance > 0) + distance / max(cost.shape))
        if layout is not None:
            fits = [
                [all(layout(x, y) is not None for x, y in partners(a, b)) for b in theirs]
                for a in ours
            ]
            cost[~np.array(fits)] = FORBIDDEN
        result = assign(cost)
        for rows, columns in result.ambiguous:
            linen = [slot for i in rows for slot in ours[i]]
            nnx = [slot for j in columns for slot in theirs[j]]
            self._undecide(linen, nnx, _RULE if self._orders else _ADVICE)
            for slot in linen:
                del self._linen[slot]
            for slot in nnx:
                del self._nnx[slot]
        undecided = {i for group, _ in result.ambiguous for i in group}
        for i, j in result.pairs:
            if i in undecided:
                continue
            certainty = self._certainty(float(likeness[i, j]), bool(rivals[i, j]))
            for slot, partner in partners(ours[i], theirs[j]):
                how = layout(slot, partner) if layout is not None else None
                pair = Pair(slot, partner, certainty, f"{likeness[i, j]:.0%}", how or Copy())
                self._pair(pair)

    def _certainty(self, likeness: float, rivals: bool) -> Certainty:
        """What speaks for a pair, of which the names are alike, and those of others as much."""
        if rivals:
            return Certainty.NUMBERS if self._orders is None else Certainty.USE
        return Certainty.NAMES if likeness >= _ALIKE else Certainty.ONLY

    def _ranks(self, side: int, units: list[Unit]) -> np.ndarray:
        """The places of units in the order of their first use."""
        assert self._orders is not None
        order = self._orders[side]
        firsts = [
            min(order.get(path, math.inf) for slot in unit for path in leaf_paths(slot))
            for unit in units
        ]
        ranks = {first: i for i, first in enumerate(sorted(set(firsts)))}
        return np.array([float(ranks[first]) for first in firsts])

    def _different_shapes(self) -> None:
        """Pairs what has the same path though not the same shape, so that the error shows both."""
        partners = {(slot.collection, canonical(slot.path)): slot for slot in self._nnx}
        for slot in list(self._linen):
            partner = partners.pop((slot.collection, canonical(slot.path)), None)
            if partner is not None:
                self._pair(Pair(slot, partner, Certainty.EQUAL))

    def _doubt(self) -> None:
        """Takes back what only seemed to belong together."""
        for pair in scattered(self.pairs):
            self._take_back(pair, SCATTERED)
        for pair in squares(self.pairs, self._fits):
            self._take_back(pair, SQUARE)

    def _take_back(self, pair: Pair, why: str) -> None:
        self.pairs.remove(pair)
        self._undecide([pair.linen], [pair.nnx], why)


def _taken(slots: dict[Slot, None], unknown: UnknownAxis) -> list[Slot]:
    """The slots that may be the stack of a list, which nothing else may then be assigned to."""
    stacks = [slot for slot in slots if signature(slot) in unknown.stacks]
    for slot in stacks:
        del slots[slot]
    return stacks


def _which_axis(unknown: UnknownAxis) -> str:
    where, axes = unknown.where, unknown.axes
    fitting = tuple(a[0] for a in axes) if len(where) == 1 else axes
    return (
        f"{where[0]} is a stack on one side, and a list on the other; the shapes fit the axes "
        f"{fitting}: say which with stack_axis={dict(zip(where, axes[0], strict=True))}"
    )


def _rivals(likeness: np.ndarray) -> np.ndarray:
    """For each pair, whether the row or the column is as much alike to others."""
    as_good = [likeness.max(axis=axis, keepdims=True) - likeness for axis in (0, 1)]
    several = [(gap <= 0).sum(axis=axis, keepdims=True) > 1 for axis, gap in enumerate(as_good)]
    return (several[0] & (as_good[0] <= 0)) | (several[1] & (as_good[1] <= 0))

"""Partners, and what makes one doubt them."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from nnx_bridge.weights._fits import Fits
from nnx_bridge.weights._layouts import Copy, Layout, Transpose
from nnx_bridge.weights._row import Certainty
from nnx_bridge.weights._slots import Slot
from nnx_bridge.weights._units import module_of

SCATTERED = "by their shapes they belong together, by those beside them not: write a rule"
SQUARE = (
    "other arrays of this class are transposed, which nobody can see of a square one: write a rule "
    "with the layout Transpose() or Copy()"
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A slot of Linen and the slot of NNX that it fills; `layout` is that of one layer."""

    linen: Slot
    nnx: Slot
    certainty: Certainty
    why: str = ""
    layout: Layout = Copy()


def scattered(pairs: Sequence[Pair]) -> list[Pair]:
    """Single arrays that tie modules together crosswise.

    The kernel of one layer must not go where the bias of another goes, only because of its shape.
    """
    targets, origins = defaultdict(set), defaultdict(set)
    for pair in pairs:
        ours, theirs = module_of(pair.linen), module_of(pair.nnx)
        targets[ours].add(theirs)
        origins[theirs].add(ours)
    return [
        pair
        for pair in pairs
        if pair.certainty not in (Certainty.RULE, Certainty.EQUAL)
        and len(targets[module_of(pair.linen)]) > 1
        and len(origins[module_of(pair.nnx)]) > 1
    ]


def squares(pairs: Sequence[Pair], fits: Fits) -> list[Pair]:
    """Square arrays of classes of which other arrays were transposed."""
    turned = {fits.layer_class(p.nnx) for p in pairs if isinstance(p.layout, Transpose)}
    return [p for p in pairs if fits.layer_class(p.nnx) in turned and _is_square(p)]


def _is_square(pair: Pair) -> bool:
    shape = pair.linen.layer_of(pair.linen.stack or pair.nnx.stack)
    return shape is not None and len(shape) == 2 and shape[0] == shape[1]

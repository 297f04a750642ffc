"""How one array may become another: as it is, with axes merged, or turned around."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from nnx_bridge._collections import Path
from nnx_bridge.weights._layouts import Copy, Layout, Reshape, Transpose
from nnx_bridge.weights._paths import leaf_name
from nnx_bridge.weights._slots import Shape, Slot
from nnx_bridge.weights._units import by_name, is_merged

# Packages whose layers keep their arrays as Linen's do.
_KNOWN = ("flax", "nnx_bridge", "layers")


class Fits:
    """Which layouts lead from a slot of Linen to one of NNX.

    Args:
      classes: The classes of the NNX model's modules.
    """

    def __init__(self, classes: Mapping[Path, type]) -> None:
        self._classes = classes

    def between(self, ours: Slot, theirs: Slot) -> Layout | None:
        """How an array becomes another, if shapes leave no doubt; of a stack, each layer."""
        if ours.stack and theirs.stack:
            return Copy() if (ours.stack, ours.shape) == (theirs.stack, theirs.shape) else None
        stack = ours.stack or theirs.stack
        return self.of_layers(ours, ours.layer_of(stack), theirs, theirs.layer_of(stack))

    def of_layers(self, ours: Slot, shape: Shape, theirs: Slot, wanted: Shape) -> Layout | None:
        """The same for shapes that one layer of each has."""
        if not isinstance(theirs.sources[0][0].part.layout, Copy):
            return Copy() if shape == wanted else None
        if shape is None or wanted is None or by_name(ours, theirs) is None:
            return None
        if shape == wanted:
            return Copy()
        if is_merged(shape, wanted) or is_merged(wanted, shape):
            return Reshape(shape, wanted)
        if len(shape) == 2 and shape == wanted[::-1] and self._of_user(theirs):
            return Transpose()
        return None

    def layer_class(self, slot: Slot) -> tuple[type | None, str]:
        """The class that an array of NNX is in, and its name there."""
        path = slot.origin or slot.path
        return self._classes.get(path[:-1]), leaf_name(path[-1])

    def kind(self, slot: Slot) -> Hashable:
        """What slots have in common that fit the same others."""
        return slot.shape, slot.names, self.layer_class(slot)

    def _of_user(self, slot: Slot) -> bool:
        """Whether an array is in a layer whose layout is not known, as that of Flax's layers is."""
        cls, _ = self.layer_class(slot)
        return cls is not None and cls.__module__.partition(".")[0] not in _KNOWN

"""One row of a plan: some arrays of Linen, those of NNX that hold the same, and how."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

from lifted._errors import describe, path_text
from nnx_bridge._collections import Path
from nnx_bridge.weights._arrays import holds_array
from nnx_bridge.weights._layouts import Arrays, Copy, Layout, Names


class Certainty(enum.Enum):
    """Why a row is believed to be right, the best reasons first."""

    RULE = "your rule"
    EQUAL = "same path"
    NAMES = "alike in names"
    USE = "order of use"
    NUMBERS = "numbers alone"
    ONLY = "the only one"


@dataclasses.dataclass(frozen=True)
class Row:
    """Arrays of Linen and of NNX that are the same weights.

    Attributes:
      linen: Paths `(collection, *modules, name)`, in the order in which the layout takes arrays.
      nnx: Paths as in `nnx.to_flat_state`, in the order in which it returns them.
      layout: How the arrays are transformed.
      certainty: What speaks for the row.
      why: The same in words, or with numbers.
    """

    linen: tuple[Path, ...]
    nnx: tuple[Path, ...]
    layout: Layout = Copy()
    certainty: Certainty = Certainty.RULE
    why: str = ""

    def to_nnx(self, values: Arrays) -> list[Any]:
        """The values at `nnx` from those at `linen`, in the order of the paths.

        Raises:
          ValueError: They do not fit the layout.
        """
        return _applied(self.layout.to_nnx, values, self.linen, len(self.nnx))

    def to_linen(self, values: Arrays) -> list[Any]:
        """The inverse of `to_nnx`."""
        return _applied(self.layout.to_linen, values, self.nnx, len(self.linen))

    def names(self, names: Sequence[Names]) -> list[Names]:
        """The names of the axes in NNX, from those in Linen; None where they are not known."""
        result = self.layout.names(names)
        return result if len(result) == len(self.nnx) else [None] * len(self.nnx)

    @property
    def text(self) -> str:
        """The paths of both sides, for messages."""
        ours, theirs = (", ".join(map(path_text, paths)) for paths in (self.linen, self.nnx))
        return f"{ours} -> {theirs or 'nothing'}"


def _applied(
    function: Callable[[Arrays], list[Any]], values: Arrays, paths: Sequence[Path], count: int
) -> list[Any]:
    """`function(values)`; where no value is an array, that value for each of `count` results.

    An optimizer with a mask has `optax.MaskedNode()` in the place of what it does not update.
    """
    if len(values) != len(paths):
        raise ValueError(f"expected {len(paths)} values, got {len(values)}")
    if all(map(holds_array, values)):
        return function(values)
    if any(map(holds_array, values)):
        found = ", ".join(dict.fromkeys(map(describe, values)))
        raise ValueError(f"expected arrays, or none of them an array, got {found}")
    return list(values) if len(values) == count else [values[0]] * count

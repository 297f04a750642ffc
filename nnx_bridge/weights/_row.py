"""One row of a plan: some arrays of Linen, those of NNX that hold the same, and how."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

from lifted._errors import path_text
from nnx_bridge._collections import Path
from nnx_bridge.weights._arrays import compute
from nnx_bridge.weights._layouts import Arrays, Copy, Layout, Names, apply


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
      linen: Paths `(collection, *modules, name)`. For a list of `count` layers those of the first
        layer, then those of the second, and so on.
      nnx: Paths as in `nnx.to_flat_state`, in the same order.
      layout: How the arrays of one layer are transformed.
      count: How many layers there are, where one side has them stacked.
      linen_axis: The axis along which Linen's arrays are stacked; None where they are not.
      nnx_axis: The same for NNX.
      certainty: What speaks for the row.
      why: The same in words, or with numbers.
    """

    linen: tuple[Path, ...]
    nnx: tuple[Path, ...]
    layout: Layout = Copy()
    count: int = 1
    linen_axis: int | None = None
    nnx_axis: int | None = None
    certainty: Certainty = Certainty.RULE
    why: str = ""

    def to_nnx(self, values: Arrays) -> list[Any]:
        """The values at `nnx` from those at `linen`, in the order of the paths.

        Raises:
          ValueError: They do not fit the layout.
        """
        layers = self._layers(values, self.linen, self.linen_axis)
        width = len(self.nnx) // (self.count if self.nnx_axis is None else 1)
        return self._convert(self.layout.to_nnx, layers, width, self.nnx_axis)

    def to_linen(self, values: Arrays) -> list[Any]:
        """The inverse of `to_nnx`."""
        layers = self._layers(values, self.nnx, self.nnx_axis)
        width = len(self.linen) // (self.count if self.linen_axis is None else 1)
        return self._convert(self.layout.to_linen, layers, width, self.linen_axis)

    def names(self, names: Sequence[Names]) -> list[Names]:
        """The names of the axes in NNX, from those in Linen; None where they are not known."""
        if self.linen_axis is not None:
            axis = self.linen_axis
            names = [n and (*n[:axis], *n[axis:][1:]) for n in names]
            layers = [list(names)] * self.count
        else:
            layers = _chunks(names, self.count)
        result = [self.layout.names(layer) for layer in layers]
        if self.nnx_axis is not None:
            axis = self.nnx_axis
            result = [[n and (*n[:axis], None, *n[axis:]) for n in result[0]]]
        flat = [n for layer in result for n in layer]
        return flat if len(flat) == len(self.nnx) else [None] * len(self.nnx)

    def _layers(self, values: Arrays, paths: Sequence[Path], axis: int | None) -> list[list[Any]]:
        if len(values) != len(paths):
            raise ValueError(f"expected {len(paths)} values, got {len(values)}")
        if axis is None:
            return _chunks(values, self.count)
        apart = [
            apply(lambda xs: _unstack(xs[0], axis, self.count), [v], self.count) for v in values
        ]
        return [[layers[i] for layers in apart] for i in range(self.count)]

    def _convert(
        self, function: Callable[[Arrays], list[Any]], layers: list[list[Any]], width: int,
        axis: int | None,
    ) -> list[Any]:  # fmt: skip
        results = [apply(function, layer, width) for layer in layers]
        if axis is None:
            return [value for result in results for value in result]
        return [
            apply(lambda xs: compute(lambda xp, ys: [xp.stack(ys, axis)], xs), arrays, 1)[0]
            for arrays in zip(*results, strict=True)
        ]

    @property
    def text(self) -> str:
        """The paths of both sides, for messages."""
        ours, theirs = (", ".join(map(path_text, paths)) for paths in (self.linen, self.nnx))
        return f"{ours} -> {theirs or 'nothing'}"

    @property
    def layout_text(self) -> str:
        """What is done to the arrays; empty for a copy."""
        words = [] if self.linen_axis is None else [f"unstack axis {self.linen_axis}"]
        words += [str(self.layout)] if str(self.layout) else []
        words += [] if self.nnx_axis is None else [f"stack on axis {self.nnx_axis}"]
        return ", ".join(words)


def _chunks(values: Sequence[Any], count: int) -> list[list[Any]]:
    width = len(values) // count
    return [list(values[i * width : (i + 1) * width]) for i in range(count)]


def _unstack(value: Any, axis: int, count: int) -> list[Any]:
    def split(xp: Any, xs: Arrays) -> list[Any]:
        return [xp.squeeze(x, axis) for x in xp.split(xs[0], count, axis)]

    found = value.shape[axis] if axis < len(value.shape) else None
    if found != count:
        raise ValueError(f"expected a stack of {count} along axis {axis}, got {value.shape}")
    return compute(split, [value])

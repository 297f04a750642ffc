"""`Stacked`: layers that are a list on one side and a stack on the other, each with its layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from nnx_bridge.weights._arrays import compute
from nnx_bridge.weights._layouts import Arrays, Copy, Layout, Names


@dataclasses.dataclass(frozen=True)
class Stacked:
    """The same layout for each of several layers, whose arrays a side may have in a stack.

    A stack has the arrays of one layer with one more axis. A list has those of the first layer,
    then those of the second, and so on. `nn.scan` of `nn.scan` is a `Stacked` of a `Stacked`, whose
    inner axis is counted without the outer one.

    Attributes:
      layout: How the arrays of one layer are transformed.
      count: How many layers there are.
      linen_axis: The axis along which Linen's arrays are stacked; None where they are a list.
      nnx_axis: The same for NNX.

    Example:
        >>> import numpy as np
        >>> from nnx_bridge.weights import Transpose
        >>> layers = Stacked(Transpose(), 3, linen_axis=0).to_nnx([np.ones((3, 4, 5))])
        >>> len(layers), layers[0].shape
        (3, (5, 4))
    """

    layout: Layout = Copy()
    count: int = 1
    linen_axis: int | None = None
    nnx_axis: int | None = None
    kind: ClassVar[str] = "stacked"

    def to_nnx(self, values: Arrays) -> list[Any]:
        return self._through(self.layout.to_nnx, values, self.linen_axis, self.nnx_axis)

    def to_linen(self, values: Arrays) -> list[Any]:
        return self._through(self.layout.to_linen, values, self.nnx_axis, self.linen_axis)

    def names(self, names: Sequence[Names]) -> list[Names]:
        stacked: Any = None
        if self.linen_axis is None:
            layers = self._chunks(names)
        else:
            known = [n for n in names if n]
            stacked = known[0][self.linen_axis] if known else None
            layers = [[_without(n, self.linen_axis) for n in names]] * self.count
        result = [self.layout.names(layer) for layer in layers]
        if self.nnx_axis is None:
            return [n for layer in result for n in layer]
        return [_with(n, self.nnx_axis, stacked) for n in result[0]]

    def _through(
        self,
        convert: Callable[[Arrays], list[Any]],
        values: Arrays,
        before: int | None,
        after: int | None,
    ) -> list[Any]:
        if before is None:
            layers = self._chunks(values)
        else:
            apart = [_unstack(value, before, self.count) for value in values]
            layers = [[pieces[i] for pieces in apart] for i in range(self.count)]
        results = [convert(layer) for layer in layers]
        if after is None:
            return [value for result in results for value in result]
        return [
            compute(lambda xp, xs: [xp.stack(xs, after)], same)[0]
            for same in zip(*results, strict=True)
        ]

    def _chunks(self, values: Sequence[Any]) -> list[list[Any]]:
        width, left = divmod(len(values), self.count)
        if left:
            raise ValueError(f"{len(values)} arrays are not those of {self.count} equal layers")
        return [list(values[i * width : (i + 1) * width]) for i in range(self.count)]

    def __str__(self) -> str:
        words = [] if self.linen_axis is None else [f"unstack axis {self.linen_axis}"]
        words += [str(self.layout)] if str(self.layout) else []
        words += [] if self.nnx_axis is None else [f"stack on axis {self.nnx_axis}"]
        return ", ".join(words)


def _unstack(value: Any, axis: int, count: int) -> list[Any]:
    shape = tuple(value.shape)
    if not -len(shape) <= axis < len(shape) or shape[axis] != count:
        raise ValueError(f"expected a stack of {count} along axis {axis}, got {shape}")
    return compute(
        lambda xp, xs: [xp.squeeze(x, axis) for x in xp.split(xs[0], count, axis)], [value]
    )


def _without(names: Names, axis: int) -> Names:
    if names is None:
        return None
    axis %= len(names)
    return (*names[:axis], *names[axis + 1 :])


def _with(names: Names, axis: int, name: Any) -> Names:
    if names is None:
        return None
    axis %= len(names) + 1
    return (*names[:axis], name, *names[axis:])

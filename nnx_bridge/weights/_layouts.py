"""How arrays of a Linen model lie in an NNX model: pairs of inverse functions on lists of arrays.

Linen's `OptimizedLSTMCell` has eight matrices where NNX's has two, a `nn.scan` has one stacked
array where a list of layers has many. Each such difference is a `Layout`: `to_nnx` takes the arrays
of Linen and returns those of NNX, `to_linen` is its inverse, to the bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from lifted._errors import describe
from nnx_bridge.weights._arrays import compute

Names = tuple[Any, ...] | None  # The names of an array's axes, as `nn.Partitioned` has them.
Arrays = Sequence[Any]


@runtime_checkable
class Layout(Protocol):
    """A pair of inverse functions on lists of arrays; equal layouts compare equal."""

    kind: ClassVar[str]

    def to_nnx(self, values: Arrays) -> list[Any]:
        """The arrays of NNX from those of Linen."""

    def to_linen(self, values: Arrays) -> list[Any]:
        """The arrays of Linen from those of NNX."""

    def names(self, names: Sequence[Names]) -> list[Names]:
        """What becomes of the names of axes on the way to NNX; None where they are lost."""

    def __str__(self) -> str:
        """What it does, in a few words."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """The same array on both sides.

    Example:
        >>> Copy().to_nnx([np.ones(3)])[0].shape
        (3,)
    """

    kind: ClassVar[str] = "copy"

    def to_nnx(self, values: Arrays) -> list[Any]:
        return list(values)

    to_linen = to_nnx

    def names(self, names: Sequence[Names]) -> list[Names]:
        return list(names)

    def __str__(self) -> str:
        return ""


@dataclasses.dataclass(frozen=True)
class Transpose:
    """The axes in another order, that of `jax.numpy.transpose` on the way to NNX.

    Example:
        >>> Transpose((2, 0, 1)).to_nnx([np.ones((3, 4, 5))])[0].shape
        (5, 3, 4)
    """

    axes: tuple[int, ...] = (1, 0)
    kind: ClassVar[str] = "transpose"

    def to_nnx(self, values: Arrays) -> list[Any]:
        return compute(lambda xp, xs: [xp.transpose(x, self.axes) for x in xs], values)

    def to_linen(self, values: Arrays) -> list[Any]:
        inverse = tuple(int(i) for i in np.argsort(self.axes))
        return compute(lambda xp, xs: [xp.transpose(x, inverse) for x in xs], values)

    def names(self, names: Sequence[Names]) -> list[Names]:
        return [n and tuple(n[axis] for axis in self.axes) for n in names]

    def __str__(self) -> str:
        return f"transpose {self.axes}"


@dataclasses.dataclass(frozen=True)
class Reshape:
    """The same numbers in the same order in another shape, such as heads merged into features.

    Example:
        >>> Reshape((4, 2, 3), (4, 6)).to_nnx([np.ones((4, 2, 3))])[0].shape
        (4, 6)
    """

    linen: tuple[int, ...]
    nnx: tuple[int, ...]
    kind: ClassVar[str] = "reshape"

    def __post_init__(self) -> None:
        if math.prod(self.linen) != math.prod(self.nnx):
            raise ValueError(f"shapes {self.linen} and {self.nnx} have different sizes")

    def to_nnx(self, values: Arrays) -> list[Any]:
        return compute(lambda xp, xs: [xp.reshape(x, self.nnx) for x in xs], values)

    def to_linen(self, values: Arrays) -> list[Any]:
        return compute(lambda xp, xs: [xp.reshape(x, self.linen) for x in xs], values)

    def names(self, names: Sequence[Names]) -> list[Names]:
        return [None for _ in names]

    def __str__(self) -> str:
        return f"reshape {self.linen} to {self.nnx}"


@dataclasses.dataclass(frozen=True)
class Concatenate:
    """Several arrays of Linen are one of NNX, such as the gates of a recurrent cell.

    Attributes:
      sizes: The lengths of the Linen arrays along the axis.
      axis: Where they meet, counted from the end so that stacks of such arrays are taken too.

    Example:
        >>> Concatenate((2, 3)).to_nnx([np.ones((4, 2)), np.ones((4, 3))])[0].shape
        (4, 5)
    """

    sizes: tuple[int, ...]
    axis: int = -1
    kind: ClassVar[str] = "concatenate"

    def to_nnx(self, values: Arrays) -> list[Any]:
        return compute(lambda xp, xs: [xp.concatenate(xs, self.axis)], values)

    def to_linen(self, values: Arrays) -> list[Any]:
        ends = [int(end) for end in np.cumsum(self.sizes)]
        length = values[0].shape[self.axis]
        if length != ends[-1]:
            raise ValueError(
                f"expected length {ends[-1]} along axis {self.axis}, which is made of "
                f"{list(self.sizes)}, got {describe(values[0])}"
            )
        return compute(lambda xp, xs: list(xp.split(xs[0], ends[:-1], self.axis)), values)

    def names(self, names: Sequence[Names]) -> list[Names]:
        return [names[0] if all(n == names[0] for n in names) else None]

    def __str__(self) -> str:
        return f"concatenate {len(self.sizes)} along {self.axis}"


@dataclasses.dataclass(frozen=True)
class Absent:
    """An array of Linen that NNX has no place for, and that must therefore be zero.

    Attributes:
      shape: Its shape.
      dtype: Its dtype.
      reason: Why NNX does without, and what to do if it is not zero.

    Example:
        >>> Absent((2,), "float32", "NNX's layer has no bias").to_nnx([np.ones(2)])
        Traceback (most recent call last):
        ValueError: expected zeros, got a largest magnitude of 1; NNX's layer has no bias
    """

    shape: tuple[int, ...]
    dtype: str
    reason: str
    kind: ClassVar[str] = "absent"

    def to_nnx(self, values: Arrays) -> list[Any]:
        def check(xp: Any, xs: Arrays) -> list[Any]:
            largest = max(float(xp.max(xp.abs(x), initial=0)) for x in xs)
            if not largest == 0:
                raise ValueError(
                    f"expected zeros, got a largest magnitude of {largest:.3g}; {self.reason}"
                )
            return []

        # What is only described cannot be looked at.
        return [] if any(not hasattr(v, "__array__") for v in values) else compute(check, values)

    def to_linen(self, values: Arrays) -> list[Any]:
        return [np.zeros(self.shape, self.dtype)]

    def names(self, names: Sequence[Names]) -> list[Names]:
        return []

    def __str__(self) -> str:
        return "must be zero"


# The layouts of users by their names, for plans that are read from files.
CUSTOM: dict[str, Custom] = {}


@dataclasses.dataclass(frozen=True)
class Custom:
    """Two functions of the user's, known by a name so that a plan which uses them can be saved.

    Attributes:
      name: What plans call it. The last layout that was made with a name is the one it stands for.
      linen_to_nnx: From the list of Linen's arrays to the list of NNX's; traceable by JAX.
      nnx_to_linen: Its inverse.

    Example:
        >>> def flipped(arrays):
        ...     return [array[::-1] for array in arrays]
        >>> Custom("flip", flipped, flipped).to_nnx([np.arange(3)])[0]
        array([2, 1, 0])
    """

    name: str
    linen_to_nnx: Callable[[list[Any]], Sequence[Any]] = dataclasses.field(compare=False)
    nnx_to_linen: Callable[[list[Any]], Sequence[Any]] = dataclasses.field(compare=False)
    kind: ClassVar[str] = "custom"

    def __post_init__(self) -> None:
        CUSTOM[self.name] = self

    def to_nnx(self, values: Arrays) -> list[Any]:
        return compute(lambda xp, xs: list(self.linen_to_nnx(list(xs))), values)

    def to_linen(self, values: Arrays) -> list[Any]:
        return compute(lambda xp, xs: list(self.nnx_to_linen(list(xs))), values)

    def names(self, names: Sequence[Names]) -> list[Names]:
        # As many as there are arrays is not known here; the plan takes none for all.
        return []

    def __str__(self) -> str:
        return self.name

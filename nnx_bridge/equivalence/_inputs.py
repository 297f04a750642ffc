"""Random inputs within what a model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx_bridge._placement import placed_like
from nnx_bridge._values import map_leaves


@dataclasses.dataclass(frozen=True)
class Random:
    """An input that is drawn anew for each seed and step.

    Args:
      shape: Its shape.
      dtype: Its dtype. Floating point numbers come from a standard normal distribution, or are
        uniform where a range is given; booleans are a mask, of which the first along the last axis
        is always true.
      low: The smallest value.
      high: The value that all are below; integers need it, such as the size of the vocabulary.

    Raises:
      ValueError: Integers without `high`, or an empty range.

    Example:
        >>> Random((2, 8), "int32", high=100).draw(np.random.default_rng(0)).dtype
        dtype('int32')
    """

    shape: Sequence[int]
    dtype: Any = "float32"
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if jnp.issubdtype(self.dtype, jnp.integer) and self.high is None:
            raise ValueError(
                f"an input of dtype {np.dtype(self.dtype)} and shape {list(self.shape)} has no "
                "range; say which values the model takes: Random(shape, dtype, high=...)"
            )
        if self.high is not None and self.high <= (self.low or 0):
            raise ValueError(f"no value lies in [{self.low or 0}, {self.high})")

    def draw(self, random: np.random.Generator) -> jax.Array:
        """An array of random values."""
        shape, dtype = tuple(self.shape), jnp.dtype(self.dtype)
        if dtype == jnp.bool_:
            mask = random.random(shape) < 0.75
            return jnp.asarray(mask).at[..., :1].set(True) if shape else jnp.asarray(mask)
        if jnp.issubdtype(dtype, jnp.integer):
            return jnp.asarray(
                random.integers(int(self.low or 0), int(self.high or 0), shape), dtype
            )
        if self.low is None and self.high is None:
            values = random.standard_normal(shape)
            if jnp.issubdtype(dtype, jnp.complexfloating):
                values = values + 1j * random.standard_normal(shape)
        else:
            low = 0.0 if self.low is None else self.low
            values = random.uniform(low, low + 1 if self.high is None else self.high, shape)
        return jnp.asarray(values, dtype)


def drawn(tree: Any, seed: int) -> Any:
    """Arguments with arrays in the place of what is left to chance.

    `Random` and `jax.ShapeDtypeStruct` anywhere in the pytree are drawn; all else stays.
    """
    random = np.random.default_rng([seed, 1])

    def draw(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return placed_like(Random(leaf.shape, leaf.dtype).draw(random), leaf)
        return leaf.draw(random) if isinstance(leaf, Random) else leaf

    return map_leaves(draw, tree, is_random)


def is_random(leaf: Any) -> bool:
    """Whether a leaf of the arguments is left to chance."""
    return isinstance(leaf, Random | jax.ShapeDtypeStruct)

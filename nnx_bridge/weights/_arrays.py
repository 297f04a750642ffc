"""Functions on arrays that also take NumPy arrays, which stay so, and descriptions of arrays.

A checkpoint is converted leaf by leaf from what was read from a file, and planned from shapes
alone; layouts are written once for all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lifted._errors import is_array


def compute(function: Callable[..., list[Any]], values: Sequence[Any]) -> list[Any]:
    """`function(xp, values)`, with NumPy for `xp` where all values are NumPy's, otherwise JAX's.

    Of `jax.ShapeDtypeStruct` the result is described, and nothing computed.
    """
    if any(isinstance(value, jax.ShapeDtypeStruct) for value in values):
        shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values]
        return list(jax.eval_shape(lambda *xs: function(jnp, xs), *shapes))
    if all(isinstance(value, np.ndarray | np.generic) for value in values):
        return function(np, values)
    return function(jnp, [jnp.asarray(value) for value in values])


def holds_array(value: Any) -> bool:
    """Whether a leaf is an array; an optimizer may also have `optax.MaskedNode` or None there."""
    return isinstance(value, jax.ShapeDtypeStruct) or is_array(value)

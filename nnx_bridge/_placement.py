"""Where arrays are: what takes the place of an array goes to the devices that it was on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh


def placed_like(value: Any, held: Any) -> jax.Array:
    """An array of JAX with the numbers of `value`, on the devices that `held` is on.

    Where JAX chose the device of `held`, or nobody did yet, `value` stays where it is.

    Args:
      value: An array of JAX or NumPy, or a number.
      held: Any array; or a `jax.ShapeDtypeStruct`, which may have a sharding too.
    """
    sharding = getattr(held, "sharding", None)
    traced = isinstance(held, jax.core.Tracer)
    of_types_only = isinstance(getattr(sharding, "mesh", None), AbstractMesh)
    if sharding is None or traced or of_types_only or not getattr(held, "committed", True):
        return jnp.asarray(value)
    return jax.device_put(value, sharding)

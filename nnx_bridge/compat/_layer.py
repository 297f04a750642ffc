"""What the compat layers share: settings and first values come from the Linen layer itself.

A compat layer is an `nnx.Module` with the names of Linen: the settings of the Linen layer are its
attributes, and the variables of the Linen layer are its Variables at the same paths, so that
`to_variables(nnx.state(layer))` is the variables dict of the Linen layer. Names that Python cannot
write after a dot, such as the gate `if`, are reached with `getattr`.

The constructor asks the Linen layer for both. `linen.Module.lazy_init` runs its initialisers and
nothing else, so the same key gives the same parameters, and metadata boxes become metadata.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from nnx_bridge._collections import to_flat_state

# Initialisers are done with once the layer exists. Kept, they would make two equal layers differ,
# since each may have been given a function of its own.
_INITIALISERS_OF_CALLS = ("carry_init",)


def set_fields(layer: nnx.Module, linen: nn.Module) -> None:
    """Gives a layer the settings of its Linen twin, as attributes of the same names."""
    for field in dataclasses.fields(linen):
        name, value = field.name, getattr(linen, field.name)
        if name in ("parent", "name") or isinstance(value, nn.Module):
            continue
        if name.endswith("_init") and name not in _INITIALISERS_OF_CALLS:
            continue
        setattr(layer, name, tuple(value) if isinstance(value, list) else value)


def set_variables(
    layer: nnx.Module, linen: nn.Module, rngs: nnx.Rngs, *inputs: Any, **kwargs: Any
) -> None:
    """Gives a layer the variables that its Linen twin makes, with a key of the stream `params`.

    Args:
      layer: The layer; its sublayers exist already.
      linen: The Linen twin, not bound.
      rngs: Where the key comes from: that of the next call of `rngs.params()`.
      *inputs: What the twin is made for, as `shaped` gives it.
      **kwargs: Further arguments of its call.
    """
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(
            f"rngs: {type(layer).__name__} makes its parameters with nnx.Rngs, got "
            f"{type(rngs).__name__}; a key is given as nnx.Rngs(params=key)"
        )
    variables = linen.lazy_init({"params": rngs.params()}, *inputs, **kwargs)
    for path, variable in to_flat_state(variables):
        owner = layer
        for name in path[:-1]:
            owner = getattr(owner, name)
        setattr(owner, path[-1], variable)


def shaped(*shape: int) -> jax.ShapeDtypeStruct:
    """An input of which the shape alone is known."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def unset() -> dict[str, Any]:
    """Arguments for a sublayer whose parameters `set_variables` is going to put in."""
    zeros = nnx.initializers.zeros_init()
    return {"kernel_init": zeros, "rngs": nnx.Rngs(0)}

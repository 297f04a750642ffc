"""`fold_rngs`: a function draws from RNG streams of its own."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lifted._errors import Path
from nnx_bridge.transforms._targets import check_output, functionalized, lift_target, with_targets


def fold_rngs(target: Any, variables: Any = True, rngs: Any = True) -> Any:
    """`flax.linen.fold_rngs` on NNX: the streams are forked for each call.

    However much the function draws, the module's streams advance by one. So what is drawn after it
    does not depend on it.

    Args:
      target: a class of NNX modules, or a function of a module.
      variables: filter of the collections that are visible inside.
      rngs: filter of the RNG streams that are forked and visible inside.

    Returns:
      A class or a function, as ``target`` is.

    Raises:
      TypeError: the target is neither.

    Example:
      >>> import jax.numpy as jnp, nnx_bridge as nn
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> numbers = nn.fold_rngs(lambda rngs: [rngs.normal() for _ in range(3)])(rngs)
      >>> int(rngs.default.count[...])
      1

    Source: https://flax.readthedocs.io/en/latest/guides/randomness.html
    """
    options = {"variables": variables, "rngs": rngs}
    return lift_target("fold_rngs", target, _folded, options)


def _folded(fn: Callable[..., Any], variables: Any = True, rngs: Any = True) -> Callable[..., Any]:
    @functools.wraps(fn)
    def folded(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        inner, mdl, (args, kwargs) = with_targets(fn, mdl, (args, kwargs))
        functional = functionalized("fold_rngs", mdl, variables=variables, rngs=rngs)
        (states,) = functional.structure.split(functional.variables)
        streams = _streams(states)
        forked: dict[Path, Any] = {}
        advanced: dict[Path, Any] = {}
        for (target, *path), (key, count) in streams.items():
            new = jax.random.fold_in(key.get_raw_value(), count.get_raw_value())
            forked[(target, *path, "key")] = key.replace(new)
            zero = jnp.zeros_like(count.get_raw_value())
            forked[(target, *path, "count")] = count.replace(zero)
            advanced[(target, *path, "key")] = key
            advanced[(target, *path, "count")] = count.replace(count.get_raw_value() + 1)
        given = [
            nnx.from_flat_state(
                [(path, forked.get((i, *path), leaf)) for path, leaf in nnx.to_flat_state(state)]
            )
            if isinstance(state, nnx.State)
            else state
            for i, state in enumerate(states)
        ]
        y, updates = functional(functional.structure.join([given]), inner, *args, **kwargs)
        check_output("fold_rngs", y)
        functional.publish([updates[0].replaced(advanced)])
        return y

    return folded


def _streams(states: list[Any]) -> dict[Path, tuple[nnx.RngKey, nnx.RngCount]]:
    """Key and count of each stream by its path."""
    found = {
        (i, *path): leaf
        for i, state in enumerate(states)
        if isinstance(state, nnx.State)
        for path, leaf in nnx.to_flat_state(state)
    }
    return {
        path[:-1]: (leaf, found[(*path[:-1], "count")])
        for path, leaf in found.items()
        if isinstance(leaf, nnx.RngKey) and (*path[:-1], "count") in found
    }

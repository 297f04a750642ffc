"""The Linen twins: the same mechanism, and equal masks for an equal key.

A layer here and its NNX counterpart select weights by the same paths, derive their keys by the same
rule and call the same `drop_weight`, so a Linen model and its migration agree bit by bit when both
are given the same key.  (Keys that are not given differ, as the frameworks derive them differently:
Linen from the scope's path, NNX from a counter.)

Initialisation draws no mask and needs no key for one.
"""

import functools
import inspect
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util

from layers._drop import drop_weight
from layers._generators import Generator, check_generator
from layers._keys import check_key
from layers._per_example import per_example_dot
from layers._rates import check_rate
from layers._select import Selector, is_weight, no_match, to_predicate, weight_keys


def drop_params(
    params: Any,
    key: jax.Array,
    rate: float,
    *,
    select: Selector = is_weight,
    generator: Generator = "default",
) -> Any:
    """A tree of Linen parameters with the selected weights dropped.

    When to use: with `module.apply`, to hold one mask over several calls.

    Args:
      params: nested dicts of arrays or of boxed arrays (`nn.Partitioned`).
      key: one PRNG key; used for each weight as in `layers.drop_weights`.
      rate: probability of dropping a weight, in [0, 1).
      select: the weights: a path glob, a predicate of (path, array), or several.
      generator: where the bits of the mask come from; see `layers.drop_weight`.

    Returns:
      A tree of the structure of `params`.

    Raises:
      ValueError: if `select` selects nothing, or `rate` is outside [0, 1).

    >>> import jax, jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    >>> drop_params(params, jax.random.key(0), 0.5)["bias"].tolist()
    [1.0, 1.0, 1.0]
    """
    key, predicate = check_key(key), to_predicate(select, "select")
    flat = traverse_util.flatten_dict(
        params, is_leaf=lambda _, leaf: isinstance(leaf, nn.meta.AxisMetadata)
    )
    chosen = [path for path, leaf in flat.items() if predicate(path, nn.meta.unbox(leaf))]
    if not chosen:
        raise no_match("select", select, flat)
    for path, weight_key in weight_keys(key, chosen).items():
        dropped = drop_weight(nn.meta.unbox(flat[path]), weight_key, rate, generator=generator)
        flat[path] = nn.meta.replace_boxed(flat[path], dropped)
    return traverse_util.unflatten_dict(flat)


def _mask_key(module: Any, deterministic: bool | None, rng: jax.Array | None) -> jax.Array | None:
    """The key of this call's mask, or None where there is nothing to mask."""
    rate = check_rate(module.rate)
    check_generator(module.generator)
    if deterministic is None:
        deterministic = module.deterministic
    if deterministic or rate == 0.0 or module.is_initializing():
        return None
    if rng is not None:
        return check_key(rng, "rng")
    if not module.has_rng(module.rng_collection):
        raise ValueError(
            f"{type(module).__name__} needs a key to draw its mask and has none. Pass "
            f"rngs={{{module.rng_collection!r}: key}} to apply, rng=key to the call, or "
            "deterministic=True."
        )
    return module.make_rng(module.rng_collection)


class DropConnectDense(nn.Dense):
    """`nn.Dense` whose weights are dropped in training; the twin of `DropConnectLinear`.

    When to use: as `layers.DropConnectLinear`, in Linen.  Its variables are those of `nn.Dense`.

    Attributes:
      rate: probability of dropping a weight, in [0, 1).
      deterministic: if True no mask is applied.
      rng_collection: the stream to ask for a key.
      generator: where the bits of the mask come from.
      per_example: if True each example (leading axis) has a mask of its own.
      Others: as in `nn.Dense`.

    Source: Wan et al., ICML 2013.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> from layers import linen
      >>> layer = linen.DropConnectDense(3, rate=0.5)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> layer.apply(variables, jnp.ones((2, 4)), rngs={"dropconnect": jax.random.key(1)}).shape
      (2, 3)
    """

    rate: float = 0.25
    deterministic: bool = False
    rng_collection: str = "dropconnect"
    generator: Generator = "default"
    per_example: bool = False

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: bool | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the layer, with a new mask unless deterministic.

        Args:
          inputs: array of shape (..., in_features).
          deterministic: overrides the attribute unless None.
          rng: a key in place of one from the stream.

        Returns:
          Array of shape (..., features).

        Raises:
          ValueError: if a mask is to be drawn and there is no key.
        """
        key = _mask_key(self, deterministic, rng)
        if key is None:
            return super().__call__(inputs)
        options = {
            name: getattr(self, name)
            for name in nn.Dense.__dataclass_fields__
            if name not in ("parent", "name")
        }
        params = self.variables["params"]
        if not self.per_example:
            params = drop_params(params, key, self.rate, generator=self.generator)
        elif self.dot_general_cls is not None:
            raise ValueError("dot_general_cls cannot be set with per_example=True.")
        else:
            dot = self.dot_general or jax.lax.dot_general
            options["dot_general"] = per_example_dot(dot, key, self.rate, self.generator)
        outputs: Any = nn.Dense(**options, parent=None).apply({"params": params}, inputs)
        return outputs


class WeightDrop(nn.Module):
    """Any Linen module, with selected weights dropped while it is called.

    When to use: as `layers.WeightDrop`, in Linen.  Fields and methods of the base layer can be
    reached through the wrapper; its methods run with masked weights.  `nn.RNN` around a wrapped
    cell needs `split_rngs={"params": False, "dropconnect": True}`, and draws a mask each step.

    Attributes:
      base_layer: the module.
      rate: probability of dropping a weight, in [0, 1).
      params: which weights: a path glob, a predicate of (path, array), or several; paths are
        relative to `base_layer`.
      deterministic: if True no mask is applied.
      rng_collection: the stream to ask for a key.
      generator: where the bits of the mask come from.

    Source: Wan et al., ICML 2013; for recurrent weights, Merity et al., ICLR 2018.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from layers import linen
      >>> layer = linen.WeightDrop(nn.Conv(4, (3, 3)), rate=0.5)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 2)))
      >>> rngs = {"dropconnect": jax.random.key(1)}
      >>> layer.apply(variables, jnp.ones((1, 8, 8, 2)), rngs=rngs).shape
      (1, 8, 8, 4)
    """

    base_layer: nn.Module
    rate: float = 0.25
    params: Selector = is_weight
    deterministic: bool = False
    rng_collection: str = "dropconnect"
    generator: Generator = "default"

    def __call__(
        self,
        *args: Any,
        deterministic: bool | None = None,
        rng: jax.Array | None = None,
        method: str = "__call__",
        **kwargs: Any,
    ) -> Any:
        """Calls the base layer with masked weights.

        Args:
          *args, **kwargs: arguments of the base layer.
          deterministic: overrides the attribute unless None.  Also passed on where the base layer
            has an argument of this name.
          rng: a key in place of one from the stream.
          method: the method of the base layer to call.

        Returns:
          What the base layer returns.

        Raises:
          ValueError: if a mask is to be drawn and there is no key, or `params` selects nothing.
        """
        key = _mask_key(self, deterministic, rng)
        accepted = inspect.signature(getattr(self.base_layer, method)).parameters
        if deterministic is not None and "deterministic" in accepted:
            kwargs["deterministic"] = deterministic

        def call(base: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return getattr(base, method)(*args, **kwargs)

        if key is None:
            return call(self.base_layer, *args, **kwargs)

        def mask(variables: Any) -> Any:
            dropped = drop_params(
                variables["params"], key, self.rate, select=self.params, generator=self.generator
            )
            return {**variables, "params": dropped}

        masked_call = nn.map_variables(call, "params", trans_in_fn=mask)
        return masked_call(self.base_layer, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Only public names: Flax and Python probe modules for private ones.
        base = vars(self).get("base_layer")
        if base is None or name.startswith("_"):
            return super().__getattr__(name)
        value = getattr(base, name)
        # The first carry of a recurrence uses no weights and is asked for outside of its loop.
        if inspect.ismethod(value) and value.__self__ is base and name != "initialize_carry":
            return functools.partial(self.__call__, method=name)
        return value


__all__ = ["DropConnectDense", "WeightDrop", "drop_params"]

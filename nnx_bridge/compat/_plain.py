"""Linen's layers without parameters of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from flax import linen as nn
from flax import nnx

Array: TypeAlias = jax.Array


class Dropout(nnx.Dropout):
    """`flax.linen.Dropout`: asks whether to drop, and takes a key for a call.

    Without `rngs` it has no variables, as in Linen, and every call that drops brings a key.

    Args:
      rate: The probability that a number is dropped.
      broadcast_dims: Axes along which all numbers are dropped or none.
      deterministic: No dropout; by default the call says it. `train()` and `eval()` set it.
      rng_collection: The stream that gives the keys.
      rngs: Where a stream for all calls is taken from, None for none.

    Example:
        >>> drop = Dropout(0.5)
        >>> key, x = jax.random.key(0), jax.numpy.ones(8)
        >>> expected = nn.Dropout(0.5, deterministic=False).apply({}, x, rng=key)
        >>> bool((drop(x, False, key) == expected).all())
        True
    """

    def __init__(
        self,
        rate: float,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = None,
        rng_collection: str = "dropout",
        *,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            rate,
            broadcast_dims=tuple(broadcast_dims),
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
        )

    def __call__(
        self,
        inputs: Array,
        deterministic: bool | None = None,
        rng: Array | nnx.Rngs | nnx.RngStream | None = None,
        *,
        rngs: Array | nnx.Rngs | nnx.RngStream | None = None,
    ) -> Array:
        """Drops numbers, and scales the others.

        Args:
          inputs: Any array.
          deterministic: Returns the inputs; by default what the layer was set to.
          rng: A key, or a stream that gives it; by default the layer's own.
          rngs: The same, under the name that it has in NNX.

        Raises:
          ValueError: Neither the call nor the layer says whether to drop, or there is no key.
        """
        key = rngs if rng is None else rng
        return super().__call__(inputs, deterministic=deterministic, rngs=key)


class Sequential(nnx.Module):
    """`flax.linen.Sequential`: its layers are the attributes `layers_0`, `layers_1`, ….

    Args:
      layers: Modules and functions. A tuple that one returns is the arguments of the next, a dict
        its keyword arguments.

    Example:
        >>> model = Sequential([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu])
        >>> model(jax.numpy.ones((1, 2))).shape, model.layers_0.kernel.shape
        ((1, 3), (2, 3))
    """

    def __init__(self, layers: Sequence[Callable[..., Any]]) -> None:
        if not isinstance(layers, Sequence):
            raise TypeError(
                f"layers: expected a sequence of modules and functions, got {type(layers).__name__}"
            )
        if not layers:
            raise ValueError("layers: expected at least one module or function")
        self._count = len(layers)
        for i, layer in enumerate(layers):
            setattr(self, f"layers_{i}", layer)

    @property
    def layers(self) -> list[Callable[..., Any]]:
        """The layers in order."""
        return [getattr(self, f"layers_{i}") for i in range(self._count)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first, *others = self.layers
        x = first(*args, **kwargs)
        for layer in others:
            if isinstance(x, tuple):
                x = layer(*x)
            elif isinstance(x, dict):
                x = layer(**x)
            else:
                x = layer(x)
        return x


class BatchApply(nnx.Module):
    """`flax.linen.BatchApply`: merges leading axes for a layer, and splits them afterwards.

    Args:
      f: A module or a function.
      num_dims: How many leading axes become one.

    Example:
        >>> model = BatchApply(nnx.Conv(2, 3, (1, 1), rngs=nnx.Rngs(0)))
        >>> model(jax.numpy.ones((5, 4, 6, 6, 2))).shape
        (5, 4, 6, 6, 3)
    """

    def __init__(self, f: Callable[..., Any], num_dims: int = 2) -> None:
        self.f = f
        self.num_dims = num_dims

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return nn.BatchApply(self.f, self.num_dims)(*args, **kwargs)

"""The keys that Linen would draw, for native NNX models.

Linen derives the key of a layer from the key of the stream, the layer's path and how often it has
asked before; NNX counts, from a key of the layer's own. So a rewrite with equal weights drops other
units, unless its layers get the keys that Linen's got.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import jax
from flax import linen as nn
from flax import nnx


def linen_key(
    key: jax.Array, path: Sequence[str], *, stream: str = "dropout", calls: int = 0
) -> jax.Array:
    """The key that a Linen module draws in `module.apply(..., rngs={stream: key})`.

    Use it to pass keys to the layers of a native rewrite by hand; `linen_rngs` does so for a model.

    Args:
      key: The key that `apply` gets.
      path: The path of the Linen module that draws.
      stream: The name of the stream.
      calls: How often the module has drawn from the stream before, in this call of `apply`.

    Returns:
      What `self.make_rng(stream)` returns there.

    Example:
        >>> x, key = jax.numpy.ones((2, 3)), jax.random.key(1)
        >>> linen = nn.Sequential([nn.Dropout(0.5, deterministic=False)])
        >>> expected = linen.apply({}, x, rngs={"dropout": key})
        >>> native = nnx.Dropout(0.5)(x, rngs=linen_key(key, ["layers_0"]))
        >>> bool((native == expected).all())
        True
    """
    draw = _Draw(tuple(path), stream, calls)
    return cast(jax.Array, draw.apply({}, rngs={stream: key}))


@contextlib.contextmanager
def linen_rngs(
    model: nnx.Module,
    keys: Mapping[str, jax.Array],
    *,
    paths: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Lets the layers of a native NNX model draw what those of its Linen original would.

    Use it around the call of a model whose training began in Linen, where each step must equal
    Linen's; inside the function that is differentiated or compiled. It holds for every layer with
    the attributes `rngs` and `rng_collection`, as `nnx.Dropout` has. A `Host` does not need it.

    Args:
      model: The model.
      keys: What `module.apply` would get as `rngs`.
      paths: The Linen paths of layers with other names there, by their NNX paths, both written as
        `encoder/Dropout_0`. By default they are equal.

    Returns:
      A context manager; when it ends, the layers have the streams that they had.

    Raises:
      ValueError: `paths` names a layer that does not draw random numbers, or that is not there.

    Example:
        >>> x, key = jax.numpy.ones((2, 3)), jax.random.key(1)
        >>> class Model(nnx.Module):
        ...     def __init__(self):
        ...         self.Dropout_0 = nnx.Dropout(0.5)
        ...     def __call__(self, x):
        ...         return self.Dropout_0(x)
        >>> model = Model()
        >>> with linen_rngs(model, {"dropout": key}):
        ...     y = model(x)
        >>> bool((y == nnx.Dropout(0.5)(x, rngs=linen_key(key, ["Dropout_0"]))).all())
        True
    """
    layers = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if hasattr(module, "rng_collection") and hasattr(module, "rngs")
    }
    paths = paths or {}
    unknown = sorted(set(paths) - set(layers))
    if unknown:
        raise ValueError(
            f"no layer that draws random numbers is at {unknown[0]!r}; they are at "
            f"{', '.join(sorted(layers)) or 'no path'}"
        )
    before: list[tuple[Any, Any]] = []
    try:
        for path, layer in layers.items():
            if layer.rng_collection in keys:
                before.append((layer, layer.rngs))
                linen = tuple(part for part in paths.get(path, path).split("/") if part)
                layer.rngs = nnx.data(_LinenStream(keys[layer.rng_collection], linen, layer))
        yield
    finally:
        for layer, rngs in before:
            layer.rngs = nnx.data(rngs)


class _LinenStream(nnx.RngStream):
    """A stream that draws Linen's keys."""

    def __init__(self, key: jax.Array, path: tuple[str, ...], layer: Any) -> None:
        super().__init__(key, tag=layer.rng_collection)
        self._path = path
        self._calls = 0

    def __call__(self) -> jax.Array:
        self._calls += 1
        key = self.key.get_value()
        return linen_key(key, self._path, stream=self.tag, calls=self._calls - 1)


class _Draw(nn.Module):
    """Draws a key where a module at a path would."""

    at: tuple[str, ...]
    stream: str
    calls: int

    @nn.compact
    def __call__(self) -> jax.Array:
        if self.at:
            first, *rest = self.at
            return _Draw(tuple(rest), self.stream, self.calls, name=first)()
        for _ in range(self.calls):
            self.make_rng(self.stream)
        return self.make_rng(self.stream)

"""Weight dropping for any module.

A masked copy of the module is made whose graph is new, whose selected Params are new, and whose
other Variables *are* those of the original.  Calling the copy therefore updates batch statistics,
caches, RNG counters and captures of the original with nothing to write back, and an exception
leaves nothing to restore.  Only attributes that the call assigned (a cache that it created, a
value sown outside of a capture) are handed to the original, after the call has succeeded.
"""

import functools
import inspect
from typing import Any, TypeVar

import jax
from flax import nnx

from layers._base import DropConnectModule
from layers._drop import drop_weight
from layers._flax_private import node_attributes
from layers._generators import Generator
from layers._keys import RngSource, check_key
from layers._select import Path, Selector, is_weight, join, no_match, to_predicate, weight_keys

M = TypeVar("M")


def drop_weights(
    module: M,
    key: jax.Array,
    rate: float,
    *,
    params: Selector = is_weight,
    generator: Generator = "default",
) -> M:
    """A copy of `module` whose selected weights are dropped and which shares all its other state.

    When to use: to draw one mask and use it for several calls, such as all steps of a loop
    written by hand; `WeightDrop` is the layer that does this at each of its calls.

    Args:
      module: any NNX module.
      key: one PRNG key.  A single selected weight is masked with it; each of several with
        `jax.random.fold_in(key, crc32(path))`, the path joined by "/".
      rate: probability of dropping a weight, in [0, 1).
      params: the Variables to mask: a type, a path glob, a predicate of (path, Variable), or
        several.  The default takes every Param of two or more axes that is no bias or scale.  A
        Variable that occurs twice has the first of its paths, in the order of names.
      generator: where the bits of the mask come from; see `drop_weight`.

    Returns:
      A module of the same type.  A Variable that occurs twice is masked once, and shared as
      before.  The copy is for calling: do not train or save it.

    Raises:
      ValueError: if `params` selects nothing, or `rate` is outside [0, 1).
      TypeError: if a selected Variable is not a floating or complex array.

    Source: Wan et al., ICML 2013; for recurrent weights, Merity et al., ICLR 2018.

    >>> import jax
    >>> from flax import nnx
    >>> conv = nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0))
    >>> dropped = drop_weights(conv, jax.random.key(0), 0.5)
    >>> dropped.bias is conv.bias, dropped.kernel is conv.kernel
    (True, False)
    """
    key = check_key(key)
    graphdef, state = nnx.split(module)
    leaves = dict(nnx.to_flat_state(state))
    keys = weight_keys(key, selected_weights(leaves, params))
    for path, weight_key in keys.items():
        leaves[path] = _masked(path, leaves[path], weight_key, rate, generator)
    return nnx.merge(graphdef, nnx.from_flat_state(list(leaves.items())), copy=False)


def selected_weights(leaves: dict[Path, Any], params: Selector) -> list[Path]:
    """The paths that `params` selects, in order; an error if there are none."""
    predicate = to_predicate(params, "params")
    paths = [path for path, leaf in leaves.items() if predicate(path, leaf)]
    if not paths:
        weights = [path for path, leaf in leaves.items() if isinstance(leaf, nnx.Param)]
        raise no_match("params", params, weights)
    return paths


def _masked(path: Path, variable: Any, key: jax.Array, rate: float, generator: Generator) -> Any:
    try:
        return variable.replace(drop_weight(variable[...], key, rate, generator=generator))
    except TypeError as error:
        raise TypeError(f"cannot drop weights of {join(path)!r}: {error}") from error


def _nodes(module: nnx.Module) -> list[nnx.Pytree]:
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Pytree)]


class WeightDrop(DropConnectModule):
    """Any module, with selected weights dropped while it is called.

    When to use: for DropConnect in convolutions, einsums, embeddings, attention, recurrent
    layers, or a whole block.  One mask is drawn in each call and holds for all of it:
    `WeightDrop(nnx.RNN(cell), params=hidden_to_hidden)` has one mask for each sequence.  Around
    the cell instead, each step has its own.

    Attributes and methods of the base layer can be reached through the wrapper; its methods run
    with masked weights and take `deterministic` and `rngs` as the call does.

    Args:
      base_layer: the module; it is held, and its Variables stay as they are.
      rate: probability of dropping a weight, in [0, 1).
      params: which Variables to mask, as in `drop_weights`.
      rng_collection: the stream to ask for a key.
      rngs: `nnx.Rngs`, `nnx.RngStream` or a key; a stream forked from it is held.
      generator: where the bits of the mask come from; see `drop_weight`.

    Attributes:
      base_layer, rate, params, rng_collection, rngs, generator: as above.
      deterministic: starts as False; `train`, `eval`, `set_attributes` and `nnx.view` change it.

    Raises:
      TypeError: if `base_layer` is not a module, or an argument has the wrong type.
      ValueError: if `params` selects nothing, or `rate` is NaN or outside [0, 1).

    Source: Wan et al., ICML 2013; Merity et al., ICLR 2018.

    Example::

      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from layers import WeightDrop, hidden_to_hidden
      >>> rnn = nnx.RNN(nnx.LSTMCell(2, 4, rngs=nnx.Rngs(0)))
      >>> layer = WeightDrop(rnn, 0.5, params=hidden_to_hidden, rngs=nnx.Rngs(1))
      >>> layer(jnp.ones((1, 7, 2))).shape
      (1, 7, 4)
    """

    def __init__(
        self,
        base_layer: nnx.Module,
        rate: float = 0.25,
        *,
        params: Selector = is_weight,
        rng_collection: str = "dropconnect",
        rngs: RngSource | None = None,
        generator: Generator = "default",
    ):
        if not isinstance(base_layer, nnx.Module):
            raise TypeError(f"base_layer must be an nnx.Module, got {type(base_layer).__name__}.")
        super().__init__(rate, generator, rng_collection, rngs)
        # Static attributes take part in hashing, so a list becomes a tuple.
        self.params = tuple(params) if isinstance(params, list) else params
        selected_weights(dict(nnx.to_flat_state(nnx.state(base_layer))), self.params)
        self.base_layer = base_layer

    def draw(self, *, deterministic: bool | None = None, rngs: RngSource | None = None) -> Any:
        """The base layer with one mask drawn, or the base layer itself when deterministic.

        When to use: to hold one mask over several calls.

        Args:
          deterministic: overrides the attribute unless None.
          rngs: `nnx.Rngs`, `nnx.RngStream` or a key, used in place of the held stream.

        Returns:
          A module of the type of the base layer, as from `drop_weights`.

        Raises:
          ValueError: if a mask is to be drawn and there is no key.
          TypeError: if `rngs` is not a source of keys.
        """
        key = self.mask_key(deterministic, rngs)
        if key is None:
            return self.base_layer
        return drop_weights(
            self.base_layer, key, self.rate, params=self.params, generator=self.generator
        )

    def __call__(
        self,
        *args: Any,
        deterministic: bool | None = None,
        rngs: RngSource | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the base layer with masked weights.

        Args:
          *args, **kwargs: arguments of the base layer.
          deterministic: if True no mask is applied, if False one is; None means the attribute.
            Also passed on where the base layer has an argument of this name.
          rngs: source of the key, in place of the held stream.  Also passed on where the base
            layer has an argument of this name, unless it is a bare key: that is the mask's alone.

        Returns:
          What the base layer returns.

        Raises:
          ValueError: if a mask is to be drawn and there is no key.
          TypeError: if `rngs` is not a source of keys.
        """
        return self._run("__call__", *args, deterministic=deterministic, rngs=rngs, **kwargs)

    def _run(
        self,
        method: str,
        *args: Any,
        deterministic: bool | None = None,
        rngs: RngSource | None = None,
        **kwargs: Any,
    ) -> Any:
        layer = self.draw(deterministic=deterministic, rngs=rngs)
        function = getattr(layer, method)
        accepted = inspect.signature(function).parameters
        if deterministic is not None and "deterministic" in accepted:
            kwargs["deterministic"] = deterministic
        if isinstance(rngs, nnx.Rngs | nnx.RngStream) and "rngs" in accepted:
            kwargs["rngs"] = rngs
        if layer is self.base_layer:
            return function(*args, **kwargs)
        pairs = [
            (original, copy, node_attributes(copy))
            for original, copy in zip(_nodes(self.base_layer), _nodes(layer), strict=True)
        ]
        result = function(*args, **kwargs)
        for original, copy, before in pairs:
            for name, value in node_attributes(copy).items():
                if name not in before or before[name] is not value:
                    setattr(original, name, value)
        return result

    def __getattr__(self, name: str) -> Any:
        # Only public names: Flax and Python probe modules for private ones.
        base = vars(self).get("base_layer")
        if base is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(base, name)
        if inspect.ismethod(value) and value.__self__ is base:
            return functools.partial(self._run, name)
        return value

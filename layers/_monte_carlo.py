"""Monte-Carlo prediction: the distribution of a model's output over its masks.

The samples are taken in chunks inside one `lax.scan`.  The mean and the sum of squared deviations
are merged chunk by chunk (Chan, Golub, LeVeque, 1983), which neither cancels nor keeps samples, so
memory depends on the chunk and not on their number.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers._base import DropConnectModule
from layers._drop import wide_dtype
from layers._keys import check_key
from layers._rates import check_count
from layers._select import Selector, to_predicate


class Prediction(NamedTuple):
    """The result of `mc_predict`: pytrees of the structure of the model's output.

    Attributes:
      mean: mean over the samples.
      variance: unbiased variance over the samples; zero for a single sample.
      samples: every output along a new leading axis, or None unless asked for.
    """

    mean: Any
    variance: Any
    samples: Any = None


def mc_predict(
    model: Any,
    *inputs: Any,
    num_samples: int,
    key: jax.Array,
    batch_size: int = 8,
    return_samples: bool = False,
    stochastic: Selector = DropConnectModule,
    fn: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Prediction:
    """Mean and variance of a model's output over masks, in one compiled loop.

    When to use: to measure what a model does not know.  Masks are on in the modules that
    `stochastic` selects, whatever their mode, and every other module runs as it is set: call
    `model.eval()` first to have normalisation and dropout deterministic.  The model is not
    changed: no counter moves, and no statistic is updated.

    Args:
      model: an NNX model.
      *inputs: arguments of the model.
      num_samples: number of masks, at least 1.
      key: one PRNG key; sample i has the same masks for every `batch_size`.
      batch_size: samples computed at once; memory grows with it.
      return_samples: also return every output, which takes memory for all of them.
      stochastic: the modules whose masks are on: a type, a path glob, a predicate, or several;
        `(DropConnectModule, nnx.Dropout)` adds dropout.  They need not hold a key.
      fn: called as `fn(model, *inputs, **kwargs)` in place of `model(*inputs, **kwargs)`; return
        probabilities here to have their mean.
      **kwargs: keyword arguments of the model.  Arguments that are no arrays are fixed when the
        call is compiled, and must be hashable.

    Returns:
      A `Prediction` of mean, variance and, if asked for, samples.

    Raises:
      ValueError: if `num_samples` or `batch_size` is below 1, or `stochastic` selects no module
        that can be switched on.
      TypeError: if `key` is not a single key, or the output has integer leaves.

    Source: Mobiny et al., "DropConnect is effective in modeling uncertainty of Bayesian deep
    networks", Scientific Reports 11, 2021.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from layers import DropConnectLinear
    >>> model = DropConnectLinear.create(4, 2, 0.5, rngs=nnx.Rngs(0))
    >>> result = mc_predict(model, jnp.ones((3, 4)), num_samples=100, key=jax.random.key(0))
    >>> result.mean.shape, bool((result.variance > 0).all())
    ((3, 2), True)
    """
    num_samples = check_count(num_samples, "num_samples")
    chunk = min(check_count(batch_size, "batch_size"), num_samples)
    key = check_key(key)
    stochastic = tuple(stochastic) if isinstance(stochastic, list) else stochastic
    graphdef, state = nnx.split(_switched_on(model, stochastic))
    leaves, treedef = jax.tree.flatten((inputs, kwargs))
    arrays = [leaf if isinstance(leaf, jax.Array | np.ndarray) else None for leaf in leaves]
    others = tuple(None if a is not None else b for a, b in zip(arrays, leaves, strict=True))
    program = _Program(graphdef, fn or _call, stochastic, treedef, others)
    return _predict(program, num_samples, chunk, return_samples, state, arrays, key)


def _call(model: Any, *inputs: Any, **kwargs: Any) -> Any:
    return model(*inputs, **kwargs)


class _Program(NamedTuple):
    """All that is fixed when a prediction is compiled: a second call compiles nothing."""

    graphdef: Any
    fn: Callable[..., Any]
    stochastic: Selector
    treedef: Any
    others: tuple[Any, ...]  # arguments that are no arrays, and None in the place of those


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _predict(
    program: _Program,
    num_samples: int,
    chunk: int,
    return_samples: bool,
    state: Any,
    arrays: list[Any],
    key: jax.Array,
) -> Prediction:
    leaves = [b if a is None else a for a, b in zip(arrays, program.others, strict=True)]
    inputs, kwargs = jax.tree.unflatten(program.treedef, leaves)

    def sample(index: jax.Array) -> Any:
        # A copy: the counters of a sample belong to it alone.
        sampled = nnx.merge(program.graphdef, state, copy=True)
        _set_keys(sampled, jax.random.fold_in(key, index), program.stochastic)
        return program.fn(sampled, *inputs, **kwargs)

    return _accumulate(sample, num_samples, chunk, return_samples)


def _switched_on(model: Any, stochastic: Selector) -> Any:
    model = nnx.clone(model)
    modules = list(_stochastic_modules(model, stochastic))
    if not modules:
        raise ValueError(
            f"stochastic={stochastic!r} selects no module with masks; replace layers with "
            "layers.dropconnect first, or select others, such as nnx.Dropout."
        )
    for module in modules:
        module.deterministic = False
    return model


def _stochastic_modules(model: Any, stochastic: Selector) -> Any:
    predicate = to_predicate(stochastic, "stochastic")
    for path, module in nnx.iter_modules(model):
        if hasattr(module, "deterministic") and hasattr(module, "rngs") and predicate(path, module):
            yield module


def _set_keys(model: Any, key: jax.Array, stochastic: Selector) -> None:
    for index, module in enumerate(_stochastic_modules(model, stochastic)):
        tag = getattr(module, "rng_collection", "dropconnect")
        module.rngs = nnx.RngStream(jax.random.fold_in(key, index), tag=tag)


def _accumulate(
    sample: Callable[[jax.Array], Any], num_samples: int, chunk: int, return_samples: bool
) -> Prediction:
    shapes = jax.eval_shape(sample, jnp.uint32(0))
    for leaf in jax.tree.leaves(shapes):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"the output of the model must be floating or complex to have a mean, got "
                f"{leaf.dtype} of shape {leaf.shape}; return logits or probabilities from fn."
            )
    # Like the outputs in sharding too, as the carry of a loop must be.
    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=wide_dtype(leaf.dtype)), shapes)
    squares = jax.tree.map(lambda leaf: leaf.real, zeros)

    def step(carry: Any, start: jax.Array) -> Any:
        mean, square = carry
        indices = start + jnp.arange(chunk, dtype=jnp.uint32)
        outputs = jax.vmap(sample)(indices)
        merged = jax.tree.map(
            lambda m, s, y: _merge(m, s, start, y, indices < num_samples), mean, square, outputs
        )
        mean = jax.tree.map(lambda _, pair: pair[0], mean, merged)
        square = jax.tree.map(lambda _, pair: pair[1], square, merged)
        return (mean, square), outputs if return_samples else None

    starts = jnp.arange(0, num_samples, chunk, dtype=jnp.uint32)
    (mean, square), outputs = jax.lax.scan(step, (zeros, squares), starts)
    flat = jax.tree.map(lambda y: y.reshape((-1, *y.shape[2:]))[:num_samples], outputs)
    return Prediction(
        jax.tree.map(lambda m, leaf: m.astype(leaf.dtype), mean, shapes),
        jax.tree.map(
            lambda s, leaf: (s / max(num_samples - 1, 1)).astype(jnp.finfo(leaf.dtype).dtype),
            square,
            shapes,
        ),
        flat,
    )


def _merge(
    mean: jax.Array, square: jax.Array, count: jax.Array, outputs: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Moments of `count` earlier samples joined with those of the valid ones of a chunk."""
    outputs = outputs.astype(mean.dtype)
    valid = valid.reshape((-1,) + (1,) * mean.ndim)
    added = valid.sum().astype(square.dtype)
    chunk_mean = jnp.where(valid, outputs, 0).sum(0) / added
    deviation = jnp.where(valid, outputs - chunk_mean[None], 0)
    delta = chunk_mean - mean
    total = count.astype(square.dtype) + added
    weight = count.astype(square.dtype) * added / total
    square = square + (jnp.abs(deviation) ** 2).sum(0) + jnp.abs(delta) ** 2 * weight
    return mean + delta * (added / total), square

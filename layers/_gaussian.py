"""The inference of the DropConnect paper: the pre-activation as a Gaussian.

A pre-activation is a sum of many independent terms, each a weight that is there or not.  With keep
probability p and kept weights scaled by 1/p, its mean is the plain product x W + b and its variance
(1 - p) / p · x² W².  The paper draws from that Gaussian *before* the activation and averages after
it, which costs two products for any number of draws.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from layers._drop import keep_probability, wide_dtype
from layers._keys import check_key
from layers._linear import DropConnectLinear
from layers._rates import check_count


def gaussian_moments(layer: DropConnectLinear, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Exact mean and variance of a layer's output over masks.

    When to use: for the uncertainty of one layer without sampling it.  The moments are exact; that
    the distribution is Gaussian is the approximation.

    Args:
      layer: the layer; its mode does not matter.
      inputs: array of shape (..., in_features), taken as certain.

    Returns:
      Mean and variance, each of shape (..., out_features).

    Raises:
      TypeError: if `layer` is not a `DropConnectLinear`.

    Source: Wan et al., ICML 2013, section 3.2.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> layer = DropConnectLinear.create(4, 2, 0.5, rngs=nnx.Rngs(0))
    >>> mean, variance = gaussian_moments(layer, jnp.ones((3, 4)))
    >>> bool(jnp.allclose(variance, (layer.kernel[...] ** 2).sum(0)))
    True
    """
    if not isinstance(layer, DropConnectLinear):
        raise TypeError(f"layer must be a DropConnectLinear, got {type(layer).__name__}.")
    keep = keep_probability(layer.rate, layer.generator)
    mean = layer(inputs, deterministic=True)
    inputs, kernel, _ = layer.promote_dtype((inputs, layer.kernel[...], None), dtype=layer.dtype)
    contract = (((inputs.ndim - 1,), (0,)), ((), ()))
    squares = layer.dot_general(
        jnp.abs(inputs) ** 2, jnp.abs(kernel) ** 2, contract, precision=layer.precision
    )
    return mean, (1.0 - keep) / keep * squares


def gaussian_predict(
    layer: DropConnectLinear,
    inputs: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
    *,
    num_samples: int,
    key: jax.Array,
) -> jax.Array:
    """Expected activation of a layer over masks, by moment matching.

    When to use: at prediction, in place of the plain layer: the activation of a mean is not the
    mean of the activation.  The draws are averaged in a loop; memory does not grow with them.

    Args:
      layer: the layer; its mode does not matter.
      inputs: array of shape (..., in_features).
      activation: elementwise or along the last axis, e.g. `nnx.relu` or `jax.nn.softmax`.
      num_samples: number of Gaussian draws, at least 1.
      key: one PRNG key.

    Returns:
      The average of `activation` over the draws.

    Raises:
      TypeError: if `layer` is not a `DropConnectLinear`, or `key` is not a single key.
      ValueError: if `num_samples` is below 1.

    Source: Wan et al., ICML 2013, section 3.2 and algorithm 2.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> layer = DropConnectLinear.create(4, 2, 0.5, rngs=nnx.Rngs(0))
    >>> gaussian_predict(layer, jnp.ones((3, 4)), nnx.relu, num_samples=64,
    ...                  key=jax.random.key(0)).shape
    (3, 2)
    """
    num_samples, key = check_count(num_samples, "num_samples"), check_key(key)
    mean, variance = gaussian_moments(layer, inputs)
    # The square root has no derivative at zero, where an input of zeros ends up.
    certain = variance == 0
    deviation = jnp.where(certain, 0, jnp.sqrt(jnp.where(certain, 1, variance)))

    def draw(index: jax.Array) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, index), mean.shape, mean.dtype)
        return activation(mean + deviation * noise)

    like = jax.eval_shape(draw, jnp.int32(0))
    # Half precision is summed in float32: a bfloat16 sum stands still from 256 terms on.
    total = jax.lax.fori_loop(
        0,
        num_samples,
        lambda index, total: total + draw(index),
        jnp.zeros_like(like, dtype=wide_dtype(like.dtype)),
    )
    return (total / num_samples).astype(like.dtype)

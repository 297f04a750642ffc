"""A mask for each example, in the memory of one mask.

The training rule of the paper draws a mask for every example.  Written out, that is a batch ×
weights tensor.  Here the examples are taken one after the other; each step makes its masked kernel,
uses it and forgets it, and the checkpoint around the step makes the backward pass do the same, so
that the only arrays of kernel size are the masked kernel and the gradient that is being summed.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from layers._keys import check_key


def map_examples(
    fn: Callable[[jax.Array, jax.Array], jax.Array], inputs: jax.Array, key: jax.Array
) -> jax.Array:
    """Calls `fn(example, example_key)` for each index of the leading axis of `inputs`.

    When to use: to give each example a mask of its own in a layer of your own, together with
    `drop_weight`.  `DropConnectLinear(per_example=True)` is this with the linear product.

    Args:
      fn: function of one example, shape `inputs.shape[1:]`, and one key; it may close over
        weights and be differentiated with respect to them.
      inputs: array of shape (batch, ...).
      key: one PRNG key; example i gets `jax.random.fold_in(key, i)`.

    Returns:
      The results stacked along a leading axis.

    Raises:
      ValueError: if `inputs` has no leading axis.
      TypeError: if `key` is not a single key.

    Source: Wan et al., ICML 2013, section 3 (one mask for each example).

    >>> import jax, jax.numpy as jnp
    >>> weight = jnp.ones((3, 2))
    >>> product = lambda x, key: x @ drop_weight(weight, key, 0.5)
    >>> from layers import drop_weight
    >>> map_examples(product, jnp.ones((5, 3)), jax.random.key(0)).shape
    (5, 2)
    """
    inputs, key = jnp.asarray(inputs), check_key(key)
    if inputs.ndim == 0:
        raise ValueError("inputs must have a leading axis of examples, got a scalar.")

    # Inside a scan nothing can be shared between the passes, so the barrier would only cost.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(index: jax.Array, example: jax.Array) -> jax.Array:
        return fn(example, jax.random.fold_in(key, index))

    return jax.lax.map(lambda pair: step(*pair), (jnp.arange(inputs.shape[0]), inputs))

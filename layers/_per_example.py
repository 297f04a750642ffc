"""A mask for each example, in the memory of one mask.

The training rule of the paper draws a mask for every example.  Written out, that is a batch ×
weights tensor.  Here the examples are taken one after the other; each step makes its masked weight,
uses it and forgets it, and the checkpoint around the step makes the backward pass do the same.

A linear product also takes its kernel a block of rows at a time, with the loop over examples inside
the loop over blocks.  The gradient of a block is then complete before the next one begins, and
neither a masked kernel nor a second gradient of its size ever exists.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from layers._drop import drop_rows, wide_dtype
from layers._generators import GENERATORS, ROWS, Generator
from layers._keys import check_key
from layers._rates import WORD

_BLOCKS = 16  # a block is at most this part of a kernel
_SMALL = 2**14  # kernels of fewer weights are not worth a loop


def map_examples(
    fn: Callable[[jax.Array, jax.Array], jax.Array], inputs: jax.Array, key: jax.Array
) -> jax.Array:
    """Calls `fn(example, example_key)` for each index of the leading axis of `inputs`.

    When to use: to give each example a mask of its own in a layer of your own, together with
    `drop_weight`.

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
    >>> from layers import drop_weight
    >>> weight = jnp.ones((3, 2))
    >>> product = lambda x, key: x @ drop_weight(weight, key, 0.5)
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


def per_example_dot(
    dot_general: Callable[..., jax.Array], key: jax.Array, rate: float, generator: Generator
) -> Callable[..., jax.Array]:
    """A `dot_general` for linear layers that drops the kernel for each example alone.

    Args:
      dot_general: the product to take; called as linear layers call it.
      key: one PRNG key; example i (index of the leading axis) has the mask of
        `jax.random.fold_in(key, i)`.  Inputs of one axis are a single example.
      rate: checked drop rate.
      generator: checked name.

    Returns:
      A function of inputs (batch, ..., rows), kernel (rows, columns), the dimension numbers, which
      it knows, and further options of `dot_general`.
    """

    def dot(inputs: jax.Array, kernel: jax.Array, _: object, **options: object) -> jax.Array:
        def product(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
            contract = (((inputs.ndim - 1,), (0,)), ((), ()))
            return dot_general(inputs, kernel, contract, **options)

        batch = inputs if inputs.ndim > 1 else inputs[None]
        outputs = _by_blocks(product, batch, kernel, key, rate, generator)
        return outputs if inputs.ndim > 1 else outputs[0]

    return dot


def _by_blocks(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    inputs: jax.Array,
    kernel: jax.Array,
    key: jax.Array,
    rate: float,
    generator: Generator,
) -> jax.Array:
    size = _block_rows(kernel, generator)
    count = kernel.shape[0] // size if size else 1
    blocks = kernel.reshape((count, size, kernel.shape[1]))
    parts = jnp.moveaxis(inputs.reshape((*inputs.shape[:-1], count, size)), -2, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def term(index: jax.Array, part: jax.Array, block: jax.Array) -> jax.Array:
        def masked(example: jax.Array, key: jax.Array) -> jax.Array:
            return product(example, drop_rows(block, key, rate, generator, index * size))

        return map_examples(masked, part, key)

    scanned = (jnp.arange(count), parts, blocks)
    like = jax.eval_shape(term, *(xs[0] for xs in scanned))
    # Half precision is summed over the blocks in float32.
    total = jnp.zeros_like(like, dtype=wide_dtype(like.dtype))
    total, _ = jax.lax.scan(lambda total, xs: (total + term(*xs), None), total, scanned)
    return total.astype(like.dtype)


def _block_rows(kernel: jax.Array, generator: Generator) -> int:
    """Rows in a block: a divisor of all rows that a generator can begin at, or all rows."""
    rows = kernel.shape[0]
    if not GENERATORS[generator].by_rows or not _SMALL <= kernel.size <= WORD:
        return rows
    sizes = range(rows // _BLOCKS // ROWS * ROWS, 0, -ROWS)
    return next((size for size in sizes if rows % size == 0), rows)

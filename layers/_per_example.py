"""A mask for each example, in the memory of one mask.

The training rule of the paper draws a mask for every example.  Written out, that is a batch ×
weights tensor.  Here the examples are taken one after the other; each step makes its masked weight,
uses it and forgets it, and the checkpoint around the step makes the backward pass do the same.

A linear product also takes its kernel a block of rows at a time, with the loop over examples inside
the loop over blocks.  The gradient of a block is then complete before the next one begins, and
neither a masked kernel nor a second gradient of its size ever exists.

A loop over an axis that is sharded would gather it.  So an axis is first cut into as many equal
parts as there are devices; a step takes one place of every part, and thereby each device something
of its own.  On one device that is one example, and one block, at a time.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

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
    return _map(fn, inputs, key, _devices(inputs))


def _map(
    fn: Callable[[jax.Array, jax.Array], jax.Array],
    inputs: jax.Array,
    key: jax.Array,
    devices: int,
) -> jax.Array:
    """`map_examples` for examples that lie on up to so many devices."""
    count = inputs.shape[0]
    together = math.gcd(count, devices) or 1
    indices = jnp.arange(count)
    spec = jax.typeof(inputs).sharding.spec
    if any(spec[:1]):  # Explicit sharding: what is mapped together has to be sharded alike.
        indices = jax.sharding.reshard(indices, PartitionSpec(spec[0]))

    # Inside a scan nothing can be shared between the passes, so the barrier would only cost.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(index: jax.Array, example: jax.Array) -> jax.Array:
        return fn(example, jax.random.fold_in(key, index))

    if together == 1:  # A batch axis of one example would cost a copy of what is closed over.
        return jax.lax.map(lambda pair: step(*pair), (indices, inputs))
    pairs = tuple(_cut(x, together) for x in (indices, inputs))
    outputs = jax.lax.map(lambda pair: jax.vmap(step)(*pair), pairs)
    return jnp.moveaxis(outputs, 1, 0).reshape((count, *outputs.shape[2:]))


def _cut(x: jax.Array, together: int) -> jax.Array:
    """The leading axis in equal parts; the first axis is the place in a part, the second the
    part."""
    return x.reshape((together, x.shape[0] // together, *x.shape[1:])).swapaxes(0, 1)


def _devices(*arrays: jax.Array) -> int:
    """On how many devices arrays may lie, as far as that is known while a program is made."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
        return math.prod(size for size, kind in kinds if kind is not AxisType.Manual)
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        return jax.device_count()
    return max(len(x.sharding.device_set) for x in arrays)


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

    def dot(inputs: jax.Array, kernel: jax.Array, _: object, **options: Any) -> jax.Array:
        def product(inputs: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
            contract = (((inputs.ndim - 1,), (0,)), ((), ()))
            return dot_general(inputs, kernel, contract, **options)

        batch = inputs if inputs.ndim > 1 else inputs[None]
        # Its sharding is that of the plain product, and so is what is said where it has none.
        plain = jax.eval_shape(functools.partial(product, **options), batch, kernel)
        options.pop("out_sharding", None)
        masked = functools.partial(product, **options)
        run = functools.partial(_by_blocks, masked, rate=rate, generator=generator)
        if plain.sharding is not None and AxisType.Explicit in plain.sharding.mesh.axis_types:
            run = jax.sharding.auto_axes(run, out_sharding=plain.sharding)
        outputs = run(batch, kernel, key)
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
    devices = _devices(inputs, kernel)
    rows, columns = kernel.shape
    together, size = _block((rows, columns), generator, devices)
    count = rows // (together * size) if size else 1
    # Rows as (part, block, row): a step takes one block of every part.
    blocks = kernel.reshape((together, count, size, columns))
    terms = jnp.moveaxis(inputs.reshape((*inputs.shape[:-1], together, count, size)), -2, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def term(index: jax.Array, inputs: jax.Array, blocks: jax.Array) -> jax.Array:
        # Cut out here, not scanned over, which would take a copy with the axis in front.
        block = jax.lax.dynamic_index_in_dim(blocks, index, 1, keepdims=False)
        first_rows = (jnp.arange(together) * count + index) * size

        def masked(example: jax.Array, key: jax.Array) -> jax.Array:
            drop = jax.vmap(lambda rows, first: drop_rows(rows, key, rate, generator, first))
            flat = example.reshape((*example.shape[:-2], together * size))
            return product(flat, drop(block, first_rows).reshape((together * size, columns)))

        return _map(masked, inputs, key, devices)

    like = jax.eval_shape(term, jnp.int32(0), terms[0], blocks)
    # Half precision is summed over the blocks in float32.
    total = jnp.zeros_like(like, dtype=wide_dtype(like.dtype))
    scanned = (jnp.arange(count), terms)
    total, _ = jax.lax.scan(lambda total, xs: (total + term(*xs, blocks), None), total, scanned)
    return total.astype(like.dtype)


def _block(shape: tuple[int, int], generator: Generator, devices: int) -> tuple[int, int]:
    """Into how many parts the rows are cut, and how many of each are taken in a step: rows at which
    a generator can begin, or all."""
    rows, columns = shape
    if not GENERATORS[generator].by_rows or not _SMALL <= rows * columns <= WORD:
        return 1, rows
    if rows % ROWS:
        return 1, rows
    together = math.gcd(rows // ROWS, devices)
    part = rows // together
    sizes = range(max(part // _BLOCKS // ROWS, 1) * ROWS, 0, -ROWS)
    return together, next(size for size in sizes if part % size == 0)

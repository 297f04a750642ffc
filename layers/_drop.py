"""The one weight-drop mechanism: draw a mask, scale by the true keep probability, apply.

Every layer of the package, the Linen twins, the per-example product and Monte-Carlo prediction
call `drop_weight`.  Its derivative rules are JAX's own: the mask is a constant of the program, so
forward mode, reverse mode, higher orders, `vmap` over keys, `scan` and sharding need nothing here.

The application runs under `jax.checkpoint`.  Between the passes only the weight itself (alive
anyway) and the generator's stored bits are kept; the masked weight is made again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from layers._generators import GENERATORS, Generator, RowIndex, check_generator
from layers._keys import check_key
from layers._rates import check_rate


def keep_probability(rate: float, generator: Generator = "default") -> float:
    """The probability with which `generator` really keeps a weight at `rate`.

    When to use: to scale by hand, or to test statistics.  The generators work with a resolution
    of 2**-32 (`bernoulli`: 2**-23); the scale of the kept weights is the reciprocal of this.

    Args:
      rate: probability of dropping a weight, in [0, 1).
      generator: `'default'`, `'fast'` or `'bernoulli'`.

    Returns:
      A float in (0, 1]; 1.0 at rate 0.

    Raises:
      TypeError: if `rate` is not a real number.
      ValueError: if `rate` is outside [0, 1) or `generator` is unknown.

    >>> keep_probability(0.25)
    0.75
    """
    rate = check_rate(rate)
    return GENERATORS[check_generator(generator)].probability(rate) if rate else 1.0


def keep_mask(
    key: jax.Array, shape: tuple[int, ...], rate: float, *, generator: Generator = "default"
) -> jax.Array:
    """The mask that `drop_weight` applies for the same arguments.

    When to use: to write a mask out in a test, or to build a layer of your own.

    Args:
      key: one PRNG key, typed or raw (`uint32`).
      shape: shape of the weight.
      rate: probability of dropping a weight, in [0, 1).
      generator: `'default'`, `'fast'` or `'bernoulli'`.

    Returns:
      A boolean array of `shape`; True where the weight is kept.

    Raises:
      TypeError: if `key` is not a single key, or `rate` is not a real number.
      ValueError: if `rate` is outside [0, 1) or `generator` is unknown.

    >>> import jax
    >>> keep_mask(jax.random.key(0), (2, 3), 0.5).shape
    (2, 3)
    """
    rate, key = check_rate(rate), check_key(key)
    bits = GENERATORS[check_generator(generator)]
    shape = tuple(shape)
    if rate == 0.0:
        return jnp.ones(shape, bool)
    return bits.expand(bits.draw(key, shape, rate), shape, rate)


def drop_weight(
    weight: jax.Array, key: jax.Array, rate: float, *, generator: Generator = "default"
) -> jax.Array:
    """`weight` with each element zeroed with probability `rate`, the rest scaled up.

    When to use: to add DropConnect to a layer that this package does not know.  The expectation
    over keys is `weight`.

    Args:
      weight: array of any shape, of a floating or complex dtype.
      key: one PRNG key, typed or raw (`uint32`).
      rate: probability of dropping an element, in [0, 1); 0 returns `weight`.
      generator: `'default'` (threefry), `'fast'` (an integer hash, cheapest, drawn again in the
        backward pass instead of stored) or `'bernoulli'` (the bits of `jax.random.bernoulli`).

    Returns:
      An array of the shape and dtype of `weight`.

    Raises:
      TypeError: if `weight` is not inexact, `key` is not a single key, or `rate` is not a number.
      ValueError: if `rate` is outside [0, 1) or `generator` is unknown.

    Source: Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of Neural Networks using
    DropConnect", ICML 2013.

    >>> import jax, jax.numpy as jnp
    >>> dropped = drop_weight(jnp.ones((4, 4)), jax.random.key(0), 0.5)
    >>> sorted(set(dropped.ravel().tolist()))
    [0.0, 2.0]
    """
    rate, generator, key = check_rate(rate), check_generator(generator), check_key(key)
    weight = jnp.asarray(weight)
    if not jnp.issubdtype(weight.dtype, jnp.inexact):
        raise TypeError(
            f"weight must have a floating or complex dtype, got {weight.dtype} with shape "
            f"{weight.shape}; leave integer parameters out of the selection."
        )
    return drop_rows(weight, key, rate, generator) if rate else weight


# Compiled as one unit, so that an eager call makes no intermediate arrays either.
@functools.partial(jax.jit, static_argnums=(2, 3))
def drop_rows(
    weight: jax.Array, key: jax.Array, rate: float, generator: Generator, first_row: RowIndex = 0
) -> jax.Array:
    """`drop_weight` of checked arguments, for the rows of a matrix from `first_row` on."""
    stored = GENERATORS[generator].draw(key, weight.shape, rate, first_row)
    return apply_stored(weight, stored, rate, generator)


def apply_stored(
    weight: jax.Array, stored: jax.Array, rate: float, generator: Generator
) -> jax.Array:
    """Masks and scales `weight` with the stored bits of a generator."""
    bits = GENERATORS[generator]
    scale = 1.0 / bits.probability(rate)

    @jax.checkpoint
    def apply(weight: jax.Array, stored: jax.Array) -> jax.Array:
        return select_scaled(weight, bits.expand(stored, weight.shape, rate), scale)

    return apply(weight, stored)


def select_scaled(weight: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """The kept weights times `scale`, and zeros."""
    # Selected first: in a loop over masks, XLA would keep a scaled or widened copy of the weight.
    kept = jnp.where(mask, weight, jnp.zeros((), weight.dtype))
    # Half precision is scaled in float32: a bfloat16 scale would bias every weight alike.
    return (kept.astype(wide_dtype(weight.dtype)) * scale).astype(weight.dtype)


def wide_dtype(dtype: Any) -> Any:
    """`dtype`, or float32 where it is narrower: what scales and sums are computed in."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype

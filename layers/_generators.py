"""Where the bits of a mask come from.

A generator is a pair of functions.  `draw(key, shape, rate)` returns what is worth storing between
the forward and the backward pass (of a part of a matrix, given its `first_row`);
`expand(stored, shape, rate)` turns it into a boolean mask, in elementwise operations that XLA fuses
into whatever reads the mask.

===========  =========================================  ==================  ======================
name         bits                                       resolution          stored per weight
===========  =========================================  ==================  ======================
default      both words of a threefry-2x32 block, one   2**-32              1 bit
             word per weight
fast         an integer hash of (key, position)         2**-32              nothing (two words in
                                                                            all): drawn again
bernoulli    exactly `jax.random.bernoulli`             2**-23              1 bit
===========  =========================================  ==================  ======================

`default` is as strong as JAX's own generator (Salmon et al., 2011): partitionable threefry spends
a whole block of two words on every 32 bits, this one uses both.  `fast` encrypts the key with
one such block and hashes it with each position in two rounds of a 32-bit avalanche mixer; it passes
the statistical tests of this package and is not cryptographic.

All three are functions of the key and of the position of the weight in its array alone: the same
on every backend and for every sharding, and each device makes only its own part.

Stored bits are packed, eight rows of the second-to-last axis to a byte, so that a mask which is
sharded along either of the last two axes (in multiples of eight rows) stays where it is.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layers._rates import WORD, keep_threshold

Generator: TypeAlias = Literal["default", "fast", "bernoulli"]
Shape: TypeAlias = tuple[int, ...]
RowIndex: TypeAlias = jax.Array | int

ROWS = 8  # rows that share one byte
_FLOAT_STEPS = 2**23  # distinct values of a float32 from jax.random.uniform


def check_generator(generator: str) -> Generator:
    """Returns `generator` if it is one of the three names.

    Raises:
      ValueError: if it is not.
    """
    if generator not in get_args(Generator):
        raise ValueError(
            f"generator must be one of {', '.join(map(repr, get_args(Generator)))}, "
            f"got {generator!r}."
        )
    return generator  # type: ignore[return-value]


def key_words(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The key as two 32-bit words; longer keys (`rbg`) are folded into two."""
    words = list(jax.random.key_data(key))
    for i, word in enumerate(words[2:]):
        words[i % 2] = words[i % 2] ^ mix(word + jnp.uint32(i + 1))
    return words[0], words[1]


def counter(
    shape: Shape, like: jax.Array | int = 0, first: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array]:
    """Row-major position of each element as a (high, low) pair of 32-bit words.

    `first` is the position of the first element.  `like` is a word of the key; the positions are
    made to depend on it in name, so that XLA does not move them out of a loop over keys, where they
    would be kept as arrays.
    """
    _, low = lax.optimization_barrier((like, jnp.asarray(first, jnp.uint32)))
    words = [jnp.full(shape, low), jnp.zeros(shape, jnp.uint32)]
    word, stride = 0, 1
    for axis in reversed(range(len(shape))):
        if stride * shape[axis] > WORD:
            word, stride = word + 1, 1
        position = lax.broadcasted_iota(jnp.uint32, shape, axis)
        words[word] = words[word] + position * jnp.uint32(stride)
        stride *= shape[axis]
    return words[1], words[0]


def mix(word: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which every input bit moves every output bit."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word = (word ^ (word >> jnp.uint32(shift))) * jnp.uint32(factor)
    return word ^ (word >> jnp.uint32(16))


def hash_words(
    key: tuple[jax.Array, jax.Array], position: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """The word of the `fast` generator for each (high, low) position.

    The inner round is a bijection of the position and the outer one of its result, so below
    2**32 weights no two share a word: one mask holds no repeated run.
    """
    high, low = position
    return mix(mix(low ^ key[0]) + (key[1] ^ mix(high)))


def threefry(
    key: tuple[jax.Array, jax.Array], block: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds, in operations that XLA can fuse and partition."""
    schedule = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    x, y = block[0] + key[0], block[1] + key[1]
    for step in range(1, 6):
        for rotation in rotations[(step - 1) % 2]:
            x = x + y
            y = (y << jnp.uint32(rotation)) | (y >> jnp.uint32(32 - rotation))
            y = y ^ x
        x = x + schedule[step % 3]
        y = y + schedule[(step + 1) % 3] + jnp.uint32(step)
    return x, y


def _matrix_shape(shape: Shape) -> Shape:
    """At least two axes; a vector is a column, so that its bits pack along it."""
    return shape if len(shape) > 1 else (math.prod(shape), 1)


def _bytes_shape(shape: Shape) -> Shape:
    *lead, rows, columns = _matrix_shape(shape)
    return (*lead, -(-rows // ROWS), columns)


def _unpack(packed: jax.Array, shape: Shape, rate: float) -> jax.Array:
    del rate
    *lead, rows, columns = _matrix_shape(shape)
    blocks = packed.shape[-2]
    bit = lax.broadcasted_iota(jnp.uint8, (*lead, blocks, ROWS, columns), len(lead) + 1)
    kept = ((packed[..., None, :] >> bit) & jnp.uint8(1)).astype(bool)
    kept = kept.reshape((*lead, blocks * ROWS, columns))
    return kept[..., :rows, :].reshape(shape)


def _or_bits(bits: jax.Array, axis: int) -> jax.Array:
    return lax.reduce(bits, np.uint8(0), lax.bitwise_or, (axis,))


def _draw_threefry(key: jax.Array, shape: Shape, rate: float, first_row: RowIndex = 0) -> jax.Array:
    *lead, blocks, columns = _bytes_shape(shape)
    # One axis for the four threefry blocks of a byte, each of which serves two rows.
    shape = (*lead, blocks, ROWS // 2, columns)
    axis = len(lead) + 1
    threshold = jnp.uint32(keep_threshold(rate))
    words = key_words(key)
    even, odd = threefry(words, counter(shape, words[0], first_row // 2 * columns))
    pair = (even < threshold).astype(jnp.uint8)
    pair = pair | ((odd < threshold).astype(jnp.uint8) << jnp.uint8(1))
    packed = _or_bits(pair << (lax.broadcasted_iota(jnp.uint8, shape, axis) * jnp.uint8(2)), axis)
    # Without the barrier XLA may fuse the draw into its eight readers and repeat it for each.
    return lax.optimization_barrier(packed)


def _draw_bernoulli(
    key: jax.Array, shape: Shape, rate: float, first_row: RowIndex = 0
) -> jax.Array:
    del first_row
    kept = _as_bernoulli(key, shape, rate)
    *lead, rows, columns = _matrix_shape(shape)
    blocks = -(-rows // ROWS)
    kept = kept.reshape((*lead, rows, columns))
    kept = jnp.pad(kept, [(0, 0)] * len(lead) + [(0, blocks * ROWS - rows), (0, 0)])
    kept = kept.reshape((*lead, blocks, ROWS, columns)).astype(jnp.uint8)
    axis = len(lead) + 1
    return _or_bits(kept << lax.broadcasted_iota(jnp.uint8, kept.shape, axis), axis)


def _as_bernoulli(key: jax.Array, shape: Shape, rate: float) -> jax.Array:
    """What `jax.random.bernoulli` returns.

    JAX's operation makes four arrays of the size of the weights.  Where its bits are known, those
    of its default generator, they are made here, in operations that XLA fuses.
    """
    known = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    if not known or jax.random.key_impl(key) != "threefry2x32" or math.prod(shape) > WORD:
        # A float32 probability, so that enabling 64-bit types does not change the bits.
        return jax.random.bernoulli(key, np.float32(1.0 - rate), shape)
    words = key_words(key)
    high, low = threefry(words, counter(shape, words[0]))
    # A float32 of [0, 1) is made of the upper 23 bits.
    steps = round(_bernoulli_probability(rate) * _FLOAT_STEPS)
    return ((high ^ low) >> jnp.uint32(9)) < jnp.uint32(steps)


def _draw_hash(key: jax.Array, shape: Shape, rate: float, first_row: RowIndex = 0) -> jax.Array:
    del rate
    # One threefry block, so that keys which are related by a few bits give unrelated hashes; its
    # counter is one that no weight has.
    last = jnp.uint32(WORD - 1)
    words = threefry(key_words(key), (last, last))
    first = jnp.asarray(first_row * _matrix_shape(shape)[-1], jnp.uint32)
    # What is stacked has to be sharded alike, also where keys are mapped over a sharded axis.
    first = first + (words[0] & jnp.uint32(0))
    return jnp.stack([*words, first])


def _expand_hash(words: jax.Array, shape: Shape, rate: float) -> jax.Array:
    position = counter(shape, words[0], words[2])
    return hash_words((words[0], words[1]), position) < jnp.uint32(keep_threshold(rate))


def _word_probability(rate: float) -> float:
    return keep_threshold(rate) / WORD


def _bernoulli_probability(rate: float) -> float:
    # `bernoulli` keeps when a multiple of 2**-23 is below the float32 probability.
    return math.ceil(float(np.float32(1.0 - rate)) * _FLOAT_STEPS) / _FLOAT_STEPS


class _Bits(NamedTuple):
    draw: Callable[..., jax.Array]
    expand: Callable[[jax.Array, Shape, float], jax.Array]
    probability: Callable[[float], float]
    by_rows: bool  # whether `draw` can begin at a row of a matrix, a multiple of ROWS


GENERATORS: dict[str, _Bits] = {
    "default": _Bits(_draw_threefry, _unpack, _word_probability, True),
    "fast": _Bits(_draw_hash, _expand_hash, _word_probability, True),
    "bernoulli": _Bits(_draw_bernoulli, _unpack, _bernoulli_probability, False),
}

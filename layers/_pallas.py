"""The product with a dropped kernel, the mask made in registers (Pallas).

The kernel of the `fast` generator is a hash of position, so a tile of the mask can be computed
where the tile of the weight is read: neither the mask nor the masked weight exists in memory.  The
bits are those of `drop_weight(..., generator='fast')`.

Under differentiation the value still comes from the kernel, and the tangent is written in plain
operations; transposing those gives the reverse mode, and every order follows.
"""

import functools
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from layers._drop import apply_stored, keep_probability, select_scaled
from layers._generators import GENERATORS, hash_words
from layers._keys import check_key
from layers._rates import WORD, check_rate, keep_threshold

Form: TypeAlias = Literal["plain", "kernel", "interpret"]

# JAX's default backend for GPUs wants kernels written for it; this one is portable.
_TRITON = triton.CompilerParams(num_warps=8, num_stages=2)
_TILE = 128
_DEPTH = 64  # weight rows in a step of the inner loop


def fused_product(
    inputs: jax.Array, weight: jax.Array, key: jax.Array, rate: float, *, interpret: bool = False
) -> jax.Array:
    """`inputs @ drop_weight(weight, key, rate, generator='fast')` in one kernel.

    When to use: on GPU or TPU, where the product is limited by memory.  On other backends, and for
    weights of 2**32 elements or more, the plain form runs instead.  It accumulates in float32.
    The kernel is tested in interpret mode and lowered for TPU and CUDA (Triton) by the tests; it
    has not been timed on either, so measure before you rely on it.

    Args:
      inputs: array of shape (..., rows).
      weight: array of shape (rows, columns), of the dtype of `inputs`, a real floating one.
      key: one PRNG key.
      rate: probability of dropping a weight, in [0, 1).
      interpret: run the kernel in Pallas' interpreter on any backend, for tests.

    Returns:
      Array of shape (..., columns) and the dtype of `inputs`.

    Raises:
      ValueError: if the shapes or dtypes do not fit, or `rate` is outside [0, 1).
      TypeError: if `key` is not a single key.

    >>> import jax, jax.numpy as jnp
    >>> x, weight, key = jnp.ones((2, 3)), jnp.ones((3, 4)), jax.random.key(0)
    >>> from layers import drop_weight
    >>> plain = x @ drop_weight(weight, key, 0.5, generator="fast")
    >>> bool((fused_product(x, weight, key, 0.5, interpret=True) == plain).all())
    True
    """
    rate, key = check_rate(rate), check_key(key)
    inputs, weight = jnp.asarray(inputs), jnp.asarray(weight)
    if weight.ndim != 2 or inputs.ndim < 1 or inputs.shape[-1] != weight.shape[0]:
        raise ValueError(
            "inputs must have shape (..., rows) and weight (rows, columns), got "
            f"{inputs.shape} and {weight.shape}."
        )
    if inputs.dtype != weight.dtype or not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(
            "inputs and weight must have one real floating dtype, got "
            f"{inputs.dtype} and {weight.dtype}; promote them first."
        )
    if rate == 0.0:
        return inputs @ weight
    flat = inputs.reshape((-1, inputs.shape[-1]))
    fits = flat.size > 0 and 0 < weight.size < WORD
    form = "plain" if not fits else "interpret" if interpret else "kernel"
    words = GENERATORS["fast"].draw(key, weight.shape, rate)
    outputs = _product(flat, weight, words, rate, form)
    return outputs.reshape((*inputs.shape[:-1], weight.shape[1]))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _product(
    inputs: jax.Array, weight: jax.Array, words: jax.Array, rate: float, form: Form
) -> jax.Array:
    def plain(inputs: jax.Array, weight: jax.Array, words: jax.Array) -> jax.Array:
        return inputs @ apply_stored(weight, words, rate, "fast")

    kernel = functools.partial(_call_kernel, rate=rate)
    if form == "kernel":
        gpu = functools.partial(kernel, compiler_params=_TRITON)
        # Chosen when the program is compiled, by the platform it is compiled for.
        return lax.platform_dependent(
            inputs, weight, words, cuda=gpu, rocm=gpu, tpu=kernel, default=plain
        )
    if form == "interpret":
        return kernel(inputs, weight, words, interpret=True)
    return plain(inputs, weight, words)


@_product.defjvp
def _product_jvp(rate: float, form: Form, primals: Any, tangents: Any) -> Any:
    inputs, weight, words = primals
    t_inputs, t_weight, _ = tangents
    # y = x D(w) with D linear, so dy = dx D(w) + x D(dw).
    outputs = _product(inputs, weight, words, rate, form)
    t_outputs = t_inputs @ apply_stored(weight, words, rate, "fast")
    return outputs, t_outputs + inputs @ apply_stored(t_weight, words, rate, "fast")


def _call_kernel(
    inputs: jax.Array, weight: jax.Array, words: jax.Array, *, rate: float, **options: Any
) -> jax.Array:
    batch, columns = inputs.shape[0], weight.shape[1]
    # Rows of zeros in the inputs make the masked value of padded weights irrelevant.
    inputs = _pad(inputs, (_TILE, _DEPTH))
    weight = _pad(weight, (_DEPTH, _TILE))
    depth = inputs.shape[1]
    outputs = pl.pallas_call(
        functools.partial(_kernel, rate=rate, columns=columns),
        grid=(inputs.shape[0] // _TILE, weight.shape[1] // _TILE),
        in_specs=[
            pl.BlockSpec((1, words.size), lambda i, j: (0, 0)),
            pl.BlockSpec((_TILE, depth), lambda i, j: (i, 0)),
            pl.BlockSpec((depth, _TILE), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((_TILE, _TILE), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((inputs.shape[0], weight.shape[1]), inputs.dtype),
        **options,
    )(words[None], inputs, weight)
    return outputs[:batch, :columns]


def _kernel(
    words_ref: Any, inputs_ref: Any, weight_ref: Any, outputs_ref: Any, *, rate: float, columns: int
) -> None:
    words = words_ref[0, 0], words_ref[0, 1]
    threshold, scale = jnp.uint32(keep_threshold(rate)), 1.0 / keep_probability(rate, "fast")
    shape = (_DEPTH, _TILE)
    first_column = jnp.uint32(_TILE) * pl.program_id(1).astype(jnp.uint32)

    def step(index: jax.Array, total: jax.Array) -> jax.Array:
        rows = pl.ds(index * _DEPTH, _DEPTH)
        first_row = jnp.uint32(_DEPTH) * index.astype(jnp.uint32)
        row = first_row + lax.broadcasted_iota(jnp.uint32, shape, 0)
        column = first_column + lax.broadcasted_iota(jnp.uint32, shape, 1)
        position = jnp.zeros(shape, jnp.uint32), row * jnp.uint32(columns) + column
        mask = hash_words(words, position) < threshold
        weight = select_scaled(weight_ref[rows, :], mask, scale)
        return total + jnp.dot(inputs_ref[:, rows], weight, preferred_element_type=jnp.float32)

    zeros = jnp.zeros((_TILE, _TILE), jnp.float32)
    steps = weight_ref.shape[0] // _DEPTH
    outputs_ref[...] = lax.fori_loop(0, steps, step, zeros).astype(outputs_ref.dtype)


def _pad(array: jax.Array, multiples: tuple[int, int]) -> jax.Array:
    return jnp.pad(
        array,
        [(0, -size % multiple) for size, multiple in zip(array.shape, multiples, strict=True)],
    )

"""Masks for each example: values, derivatives, and the block-wise product behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import layers
from layers._drop import drop_rows
from layers._per_example import _block

# 128 * 136 weights are enough to be taken in blocks, of which there are sixteen.
ROWS, COLUMNS = 128, 136


def make(generator="default", rows=ROWS, **options):
    linear = nnx.Linear(rows, COLUMNS, rngs=nnx.Rngs(0), **options)
    return layers.DropConnectLinear(linear, 0.4, generator=generator, per_example=True)


def written_out(layer, x, key):
    """One masked kernel for each example, all at once."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(x)))
    kernel = layer.kernel[...]
    kernels = jax.vmap(
        lambda k: layers.drop_weight(kernel, k, layer.rate, generator=layer.generator)
    )(keys)
    return jnp.einsum("b...i,bio->b...o", x, kernels) + layer.bias[...]


@pytest.mark.parametrize("shape", [(3, ROWS), (2, 5, ROWS), (0, ROWS)])
def test_each_example_has_the_mask_of_its_index(generator, shape, key):
    layer, x = make(generator), jax.random.normal(key, shape)
    # 128 products, of size about one tenth, in another order.
    np.testing.assert_allclose(layer(x, rngs=key), written_out(layer, x, key), rtol=1e-4, atol=1e-5)


def test_examples_that_are_taken_together_have_the_masks_of_their_indices(key):
    layer, x = make(), jax.random.normal(key, (2 * jax.device_count(), ROWS))
    # Compiled, the batch may lie on all devices, so as many examples are taken at a time.
    y = jax.jit(lambda x: layer(x, rngs=key))(x)
    np.testing.assert_allclose(y, written_out(layer, x, key), rtol=1e-4, atol=1e-5)


def test_a_single_example_needs_no_batch_axis(key):
    layer, x = make(), jnp.ones(ROWS)
    np.testing.assert_array_equal(layer(x, rngs=key), layer(x[None], rngs=key)[0])


def test_steps_of_a_sequence_share_the_mask_of_their_example(key):
    layer, x = make(), jnp.ones((2, 3, ROWS))
    y = layer(x, rngs=key)
    # Equal rows of one product; a matrix and a vector product may differ in the last bits.
    np.testing.assert_allclose(y[:, 0], y[:, 1], rtol=1e-5)
    assert (y[0] != y[1]).any()


def test_an_example_does_not_depend_on_the_batch(key):
    layer, x = make(), jax.random.normal(key, (5, ROWS))
    np.testing.assert_array_equal(layer(x, rngs=key)[:2], layer(x[:2], rngs=key))


def losses(layer, key):
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    c = jax.random.normal(jax.random.key(5), (3, COLUMNS))

    def ours(params, x):
        return (jnp.sin(nnx.merge(graphdef, params, rest)(x, rngs=key)) * c).sum()

    def raw(params, x):
        return (jnp.sin(written_out(nnx.merge(graphdef, params, rest), x, key)) * c).sum()

    return params, ours, raw


def assert_close(a, b):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-3, atol=1e-4), a, b)


def test_gradients_equal_those_of_the_batch_of_kernels(generator, key):
    layer, x = make(generator), jax.random.normal(key, (3, ROWS))
    params, ours, raw = losses(layer, key)
    a, b = (jax.jit(jax.grad(f, argnums=(0, 1)))(params, x) for f in (ours, raw))
    assert_close(a, b)


def test_a_weight_that_every_example_drops_has_gradient_zero(generator, key):
    layer, x = make(generator), jax.random.normal(key, (3, ROWS))
    params, ours, _ = losses(layer, key)
    gradient = jax.grad(ours)(params, x)["kernel"][...]
    masks = [
        layers.keep_mask(
            jax.random.fold_in(key, i), (ROWS, COLUMNS), layer.rate, generator=generator
        )
        for i in range(3)
    ]
    np.testing.assert_array_equal(gradient == 0.0, ~(masks[0] | masks[1] | masks[2]))


def test_forward_mode_and_second_order(key):
    layer, x = make("fast"), jax.random.normal(key, (3, ROWS))
    params, ours, raw = losses(layer, key)

    def hvp(f):
        return jax.jvp(lambda x: jax.grad(f, argnums=1)(params, x), (x,), (jnp.ones_like(x),))

    a, b = (jax.jit(lambda f=f: hvp(f))() for f in (ours, raw))
    assert_close(a, b)


@pytest.mark.parametrize(
    "rows, block", [(128, 8), (784, 16), (1024, 64), (100, 100), (136, 8), (1021, 1021)]
)
def test_kernels_are_cut_into_equal_blocks_or_not_at_all(rows, block):
    assert _block((rows, 512), "fast", 1) == (1, block)
    assert _block((rows, 512), "bernoulli", 1) == (1, rows)


def test_small_kernels_are_not_cut():
    assert _block((128, 4), "fast", 1) == (1, 128)


@pytest.mark.parametrize("rows", [128, 784, 1024, 96, 20, 1021])
@pytest.mark.parametrize("devices", [2, 3, 5, 8])
def test_a_step_takes_of_every_device_rows_at_which_a_generator_can_begin(rows, devices):
    parts, size = _block((rows, 2**14), "fast", devices)
    assert rows % (parts * size) == 0
    if rows % (8 * devices) == 0:
        assert parts == devices
    assert parts == 1 or size % 8 == 0


@pytest.mark.parametrize("generator", ["default", "fast"])
def test_a_block_of_rows_has_the_mask_of_those_rows(generator, key):
    weight = jax.random.normal(key, (32, 9))
    whole = layers.drop_weight(weight, key, 0.5, generator=generator)
    block = drop_rows(weight[8:24], key, 0.5, generator, 8)
    np.testing.assert_array_equal(block, whole[8:24])


def test_half_precision_is_summed_in_float32(key):
    layer = make(dtype=jnp.bfloat16)
    x = jax.random.normal(key, (3, ROWS))
    y = layer(x, rngs=key)
    assert y.dtype == jnp.bfloat16
    exact = written_out(layer, x.astype(jnp.bfloat16).astype("float32"), key)
    # Kernel, product and sum are each rounded to 8 bits; the outputs are of order one.
    np.testing.assert_allclose(y.astype("float32"), exact, atol=0.1)


def test_blocks_of_half_precision_are_rounded_once(key):
    linear = nnx.Linear(ROWS, COLUMNS, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    layer = layers.DropConnectLinear(linear, 0.5, per_example=True)
    layer.dtype = jnp.bfloat16
    # The first of sixteen blocks is so large that bfloat16 would round each of the others away.
    x = jnp.ones((3, ROWS)).at[:, :8].set(256.0)
    exact = written_out(layer, x, key)
    np.testing.assert_array_equal(layer(x, rngs=key), exact.astype(jnp.bfloat16))


def test_the_counter_moves_once_for_a_batch():
    layer = layers.DropConnectLinear.create(4, 4, 0.5, rngs=nnx.Rngs(0), per_example=True)
    layer(jnp.ones((7, 4)))
    assert int(layer.rngs.count[...]) == 1


def test_map_examples_names_a_missing_axis(key):
    with pytest.raises(ValueError, match="leading axis of examples, got a scalar"):
        layers.map_examples(lambda x, k: x, jnp.ones(()), key)

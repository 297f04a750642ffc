"""What the compiled programs hold: buffers, and what is kept between the passes."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import layers

SIDE = 512
KERNEL_BYTES = 4 * SIDE * SIDE

# Of eight devices, which the tests have, each would take an example at a time.
ON_ONE_DEVICE = lambda: jax.set_mesh(jax.make_mesh((1,), ("d",)))  # noqa: E731


def temporaries(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def problem(batch=64):
    x = jnp.ones((batch, SIDE))
    return x, jnp.ones((SIDE, SIDE)), jax.random.key(0)


def product(x, w, key, generator):
    return x @ layers.drop_weight(w, key, 0.25, generator=generator)


@pytest.mark.parametrize("generator", ["default", "fast", "bernoulli"])
@pytest.mark.parametrize("backward", [False, True])
def test_at_most_one_kernel_sized_buffer_beyond_plain(generator, backward):
    def measured(fn):
        if backward:
            fn = jax.grad(lambda *a, f=fn: jnp.sin(f(*a)).sum(), argnums=(0, 1))
        return temporaries(fn, *problem())

    plain = measured(lambda x, w, key: x @ w)
    ours = measured(functools.partial(product, generator=generator))
    # A few hundred bytes hold the key.
    assert ours - plain <= KERNEL_BYTES + 1024


@pytest.mark.parametrize("generator, stored", [("fast", 0), ("default", 1), ("bernoulli", 1)])
def test_between_the_passes_at_most_a_bit_a_weight_is_kept(generator, stored):
    x, w, key = problem()
    _, backward = jax.vjp(lambda w: layers.drop_weight(w, key, 0.25, generator=generator), w)
    kept = [leaf for leaf in jax.tree.leaves(backward) if hasattr(leaf, "nbytes")]
    beyond = sum(leaf.nbytes for leaf in kept) - w.nbytes
    assert beyond <= stored * w.size // 8 + 1024


def test_the_fast_mask_is_never_an_array_in_a_compiled_program():
    text = jax.jit(functools.partial(product, generator="fast")).lower(*problem()).compile()
    entry = re.search(r"ENTRY.*", text.as_text(), re.S).group()
    assert not re.search(rf"(pred|u32|u8)\[{SIDE},{SIDE}\]", entry)


@pytest.mark.parametrize("generator", ["default", "fast"])
def test_per_example_masks_take_the_memory_of_a_shared_mask(generator):
    def shared(x, w, key):
        return jnp.sin(product(x, w, key, generator)).sum()

    def each(x, w, key):
        linear = nnx.Linear(SIDE, SIDE, use_bias=False, rngs=nnx.Rngs(0))
        layer = layers.DropConnectLinear(linear, generator=generator, per_example=True)
        layer.kernel[...] = w
        return jnp.sin(layer(x, rngs=key)).sum()

    x, w, key = problem()

    def peak(fn):
        with ON_ONE_DEVICE():
            analysis = jax.jit(fn).lower(x, w, key).compile().memory_analysis()
        return (
            analysis.temp_size_in_bytes
            + analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
        )

    assert peak(each) <= 1.25 * peak(shared)
    gradients = [jax.grad(fn, argnums=(0, 1)) for fn in (each, shared)]
    assert peak(gradients[0]) <= 1.25 * peak(gradients[1])


@pytest.mark.parametrize("generator", ["default", "fast"])
def test_a_loop_over_masks_keeps_nothing_of_them_outside(generator):
    def each(x, w, key):
        return layers.map_examples(lambda x, k: product(x, w, k, generator), x, key)

    x, w, key = problem()
    with ON_ONE_DEVICE():
        beyond = temporaries(each, x, w, key) - temporaries(
            lambda x, w, key: product(x, w, key, generator), x, w, key
        )
    # One example more than nothing, the packed bits and the loop's counters.
    assert beyond <= KERNEL_BYTES // 16

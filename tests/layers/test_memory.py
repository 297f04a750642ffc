"""What the compiled programs hold and move: buffers, collectives, and independence of devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import layers

COLLECTIVES = r"all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"
SIDE = 512
KERNEL_BYTES = 4 * SIDE * SIDE

eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def temporaries(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def problem(batch=64):
    x = jnp.ones((batch, SIDE))
    return x, jnp.ones((SIDE, SIDE)), jax.random.key(0)


def product(x, w, key, generator):
    return x @ layers.drop_weight(w, key, 0.25, generator=generator)


@pytest.mark.parametrize("generator", ["default", "fast"])
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
    beyond = temporaries(each, x, w, key) - temporaries(
        lambda x, w, key: product(x, w, key, generator), x, w, key
    )
    # One example more than nothing, the packed bits and the loop's counters.
    assert beyond <= KERNEL_BYTES // 16


def mesh():
    return jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


@eight_devices
@pytest.mark.parametrize("spec", [("d", None), (None, "d")])
@pytest.mark.parametrize("backward", [False, True])
def test_a_sharded_kernel_has_the_same_mask_and_nothing_is_moved(generator, spec, backward):
    key = jax.random.key(0)
    weight = jax.random.normal(key, (SIDE, SIDE))
    sharding = NamedSharding(mesh(), PartitionSpec(*spec))

    def fn(weight, key):
        return layers.drop_weight(weight, key, 0.25, generator=generator)

    if backward:
        fn = jax.grad(lambda w, k, f=fn: (f(w, k) ** 2).sum())
    compiled = jax.jit(fn, out_shardings=sharding).lower(jax.device_put(weight, sharding), key)
    compiled = compiled.compile()
    text = compiled.as_text()
    assert not re.search(COLLECTIVES, text)
    # Each device makes its own part alone: no integer array of the whole size anywhere.
    assert not re.search(rf"(u8|u32|pred)\[(\d+,)*{SIDE},{SIDE}\]", text)
    sharded = compiled(jax.device_put(weight, sharding), key)
    np.testing.assert_array_equal(sharded, jax.jit(fn)(weight, key))


@eight_devices
def test_a_sharded_layer_gathers_no_kernel():
    key = jax.random.key(0)
    weight = jax.device_put(jnp.ones((SIDE, SIDE)), NamedSharding(mesh(), PartitionSpec(None, "d")))
    fn = functools.partial(product, generator="default")
    text = jax.jit(fn).lower(jnp.ones((4, SIDE)), weight, key).compile().as_text()
    assert not re.search(COLLECTIVES, text)


@eight_devices
def test_out_sharding_is_that_of_nnx_linear():
    explicit = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    columns = PartitionSpec(None, "d")
    with jax.set_mesh(explicit):
        linear = nnx.Linear(16, 16, use_bias=False, rngs=nnx.Rngs(0))
        linear.kernel.set_value(
            jax.device_put(linear.kernel[...], NamedSharding(explicit, columns))
        )
        x = jax.device_put(jnp.ones((8, 16)), NamedSharding(explicit, PartitionSpec(None, None)))
        layer = layers.DropConnectLinear(linear, 0.5)
        outputs = [
            linear(x, out_sharding=columns),
            layer(x, rngs=jax.random.key(0), out_sharding=columns),
        ]
    assert [jax.typeof(y).sharding.spec for y in outputs] == [columns, columns]


@eight_devices
@pytest.mark.parametrize("rows", [24, 25])
def test_any_number_of_rows_gives_the_same_mask_on_eight_devices(rows, generator):
    spec = PartitionSpec("d" if rows % 8 == 0 else None, None)
    weight = jnp.ones((rows, 7))
    sharded = jax.device_put(weight, NamedSharding(mesh(), spec))
    drop = jax.jit(lambda w, k: layers.drop_weight(w, k, 0.5, generator=generator))
    np.testing.assert_array_equal(drop(sharded, jax.random.key(0)), drop(weight, jax.random.key(0)))


@eight_devices
@pytest.mark.parametrize("spec", [("d", None), (None, "d")])
def test_explicit_sharding_keeps_the_sharding_of_the_weight(spec, generator):
    explicit = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    weight = jax.random.normal(jax.random.key(0), (64, 64))
    key = jax.random.key(1)
    with jax.set_mesh(explicit):
        sharded = jax.device_put(weight, NamedSharding(explicit, PartitionSpec(*spec)))
        dropped = layers.drop_weight(sharded, key, 0.5, generator=generator)
        grad = jax.grad(lambda w: (layers.drop_weight(w, key, 0.5, generator=generator) ** 2).sum())
        gradient = grad(sharded)
    assert dropped.sharding.spec == PartitionSpec(*spec) == gradient.sharding.spec
    np.testing.assert_array_equal(
        dropped, layers.drop_weight(weight, key, 0.5, generator=generator)
    )

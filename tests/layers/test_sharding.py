"""Eight devices: the masks of one device, and nothing gathered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import layers

COLLECTIVES = r"all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"
SIDE = 512
ROWS = PartitionSpec("d", None)
COLUMNS = PartitionSpec(None, "d")

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((8,), ("d",), axis_types=(axis_type,))


def linear(side=SIDE, spec=None, generator="default", **options):
    """A layer, its kernel sharded as told."""
    base = nnx.Linear(side, side, use_bias=False, rngs=nnx.Rngs(0))
    if spec is not None:
        base.kernel.set_value(jax.device_put(base.kernel[...], NamedSharding(mesh(), spec)))
    return layers.DropConnectLinear(base, 0.5, generator=generator, **options)


def text(fn, *args):
    return jax.jit(fn).lower(*args).compile().as_text()


@pytest.mark.parametrize("spec", [ROWS, COLUMNS])
@pytest.mark.parametrize("backward", [False, True])
def test_a_sharded_kernel_has_the_same_mask_and_nothing_is_moved(generator, spec, backward):
    key = jax.random.key(0)
    weight = jax.random.normal(key, (SIDE, SIDE))
    sharding = NamedSharding(mesh(), spec)

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


def layer_text(layer, x, key):
    graphdef, state = nnx.split(layer)
    return text(lambda state, x, key: nnx.merge(graphdef, state)(x, rngs=key), state, x, key)


@pytest.mark.parametrize("options", [{}, {"per_example": True}], ids=["shared", "per example"])
def test_a_layer_of_sharded_columns_moves_nothing(options, generator, key):
    layer = linear(spec=COLUMNS, generator=generator, **options)
    assert not re.search(COLLECTIVES, layer_text(layer, jnp.ones((4, SIDE)), key))


def test_a_layer_of_sharded_rows_adds_up_its_products_and_gathers_nothing(generator, key):
    # Each device multiplies with its own rows, so that the sum of the products is all that moves.
    compiled = layer_text(linear(spec=ROWS, generator=generator), jnp.ones((4, SIDE)), key)
    moved = set(re.findall(COLLECTIVES, compiled))
    assert moved == {"all-reduce"} and f"f32[4,{SIDE}]" in compiled


@pytest.mark.parametrize("spec", [ROWS, COLUMNS])
def test_the_gradients_of_a_sharded_layer_are_those_on_one_device(spec, generator, key):
    x = jax.random.normal(key, (4, SIDE))

    def gradient(layer):
        gradients = nnx.jit(nnx.grad(lambda m: jnp.sin(m(x, rngs=key)).sum()))(layer)
        return gradients["kernel"][...]

    one, many = (
        gradient(linear(generator=generator)),
        gradient(linear(spec=spec, generator=generator)),
    )
    np.testing.assert_array_equal(one == 0, many == 0)
    # The devices add 512 products in another order.
    np.testing.assert_allclose(many, one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"per_example": True}], ids=["shared", "per example"])
def test_parts_of_a_batch_under_shard_map(options, generator, key):
    layer, x = linear(256, generator=generator, **options), jax.random.normal(key, (16, 256))

    def part(x, key):
        return layer(x, rngs=jax.random.fold_in(key, jax.lax.axis_index("d")))

    specs = {"in_specs": (ROWS, PartitionSpec()), "out_specs": ROWS}
    mapped = jax.jit(jax.shard_map(part, mesh=mesh(), **specs))
    parts = x.reshape(8, 2, 256)
    expected = [layer(x, rngs=jax.random.fold_in(key, i)) for i, x in enumerate(parts)]
    np.testing.assert_allclose(mapped(x, key), jnp.concatenate(expected), rtol=1e-4, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: (mapped(x, key) ** 2).sum()))(x)
    assert gradient.shape == x.shape and jnp.isfinite(gradient).all()


def test_parts_of_a_weight_under_shard_map_may_have_masks_of_their_own(generator, key):
    def part(weight, key):
        key = jax.random.fold_in(key, jax.lax.axis_index("d"))
        return layers.drop_weight(weight, key, 0.5, generator=generator)

    specs = {"in_specs": (ROWS, PartitionSpec()), "out_specs": ROWS}
    dropped = jax.shard_map(part, mesh=mesh(), **specs)(jnp.ones((64, 8)), key)
    assert len({part.tobytes() for part in np.asarray(dropped).reshape(8, 8, 8)}) == 8


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_predictions_keep_the_sharding_of_the_batch(axis_type, key):
    devices = mesh(axis_type)
    x = jax.random.normal(key, (16, 64))
    with jax.set_mesh(devices):
        layer = linear(64)
        sharded = jax.device_put(x, NamedSharding(devices, ROWS))

        def predict(x):
            monte_carlo = layers.mc_predict(
                layer, x, num_samples=5, key=key, batch_size=2, return_samples=True
            )
            return monte_carlo, layers.gaussian_predict(layer, x, nnx.relu, num_samples=5, key=key)

        assert not re.search(COLLECTIVES, text(predict, sharded))
        many, expected = predict(sharded), predict(x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), many, expected
    )
    assert many[0].mean.sharding.spec[0] == many[1].sharding.spec[0] == "d"


def test_out_sharding_is_that_of_nnx_linear():
    explicit = mesh(AxisType.Explicit)
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


@pytest.mark.parametrize("rows", [24, 25])
def test_any_number_of_rows_gives_the_same_mask_on_eight_devices(rows, generator):
    spec = PartitionSpec("d" if rows % 8 == 0 else None, None)
    weight = jnp.ones((rows, 7))
    sharded = jax.device_put(weight, NamedSharding(mesh(), spec))
    drop = jax.jit(lambda w, k: layers.drop_weight(w, k, 0.5, generator=generator))
    np.testing.assert_array_equal(drop(sharded, jax.random.key(0)), drop(weight, jax.random.key(0)))


@pytest.mark.parametrize("spec", [ROWS, COLUMNS])
def test_explicit_sharding_keeps_the_sharding_of_the_weight(spec, generator):
    explicit = mesh(AxisType.Explicit)
    weight = jax.random.normal(jax.random.key(0), (64, 64))
    key = jax.random.key(1)
    with jax.set_mesh(explicit):
        sharded = jax.device_put(weight, NamedSharding(explicit, spec))
        dropped = layers.drop_weight(sharded, key, 0.5, generator=generator)
        grad = jax.grad(lambda w: (layers.drop_weight(w, key, 0.5, generator=generator) ** 2).sum())
        gradient = grad(sharded)
    assert dropped.sharding.spec == spec == gradient.sharding.spec
    np.testing.assert_array_equal(
        dropped, layers.drop_weight(weight, key, 0.5, generator=generator)
    )

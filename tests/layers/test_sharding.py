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


def test_a_layer_of_sharded_columns_moves_nothing(generator, key):
    layer = linear(spec=COLUMNS, generator=generator)
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


# Masks for each example: shapes of the mesh, sharding of the batch, sharding of the kernel.
LAYOUTS = {
    "data": ((8, 1), PartitionSpec("d"), PartitionSpec()),
    "columns": ((8, 1), PartitionSpec(), PartitionSpec(None, "d")),
    "rows": ((8, 1), PartitionSpec(None, "d"), PartitionSpec("d")),
    "data and columns": ((4, 2), PartitionSpec("d"), PartitionSpec(None, "t")),
    "data and rows": ((4, 2), PartitionSpec("d", "t"), PartitionSpec("t")),
    "fsdp": ((8, 1), PartitionSpec("d"), PartitionSpec("d")),
    "fsdp and tensor": ((4, 2), PartitionSpec("d"), PartitionSpec("d", "t")),
}


def per_example(inputs, kernel, key, generator="fast", out_sharding=None):
    base = nnx.Linear(*kernel.shape, use_bias=False, rngs=nnx.Rngs(0))
    base.kernel.set_value(kernel)
    layer = layers.DropConnectLinear(base, 0.5, generator=generator, per_example=True)
    return layer(inputs, rngs=key, out_sharding=out_sharding)


def with_gradients(fn):
    def run(inputs, kernel, key):
        def loss(x, w):
            y = fn(x, w, key)
            return jnp.sin(y).sum(), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(inputs, kernel)

    return run


def placed(layout, axis_type, side=128):
    """The mesh of a layout, and inputs and a kernel: on it, and on one device."""
    shape, *specs = LAYOUTS[layout]
    devices = jax.make_mesh(shape, ("d", "t"), axis_types=(axis_type,) * 2)
    one = [jax.random.normal(jax.random.key(i), (n, side)) for i, n in enumerate((16, side))]
    many = [
        jax.device_put(x, NamedSharding(devices, spec)) for x, spec in zip(one, specs, strict=True)
    ]
    return devices, one, many


def assert_all_close(many, one):
    """The devices add 128 products, of which the sum is some tens, in another order."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3), many, one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_per_example_move_what_a_plain_layer_moves(layout, key):
    _, one, many = placed(layout, AxisType.Auto)
    ours, plain = with_gradients(per_example), with_gradients(lambda x, w, key: x @ w)
    shardings = (tuple(x.sharding for x in many), None)  # Those of the gradients.
    compiled, reference = (
        jax.jit(fn, out_shardings=shardings).lower(*many, key).compile() for fn in (ours, plain)
    )
    moved, allowed = (set(re.findall(COLLECTIVES, c.as_text())) for c in (compiled, reference))
    assert moved <= allowed
    result = compiled(*many, key)
    assert_all_close(result, jax.jit(ours)(*one, key))
    assert result[1].sharding.spec == reference(*many, key)[1].sharding.spec


@pytest.mark.parametrize("layout", ["data and rows", "fsdp"])
def test_every_generator_masks_examples_on_eight_devices_as_on_one(layout, generator, key):
    _, one, many = placed(layout, AxisType.Auto)
    fn = jax.jit(lambda x, w: per_example(x, w, key, generator))
    assert_all_close(fn(*many), fn(*one))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_per_example_under_explicit_sharding(layout, key):
    devices, one, many = placed(layout, AxisType.Explicit)
    # Where rows of both are sharded, JAX asks for the sharding of the product, here and there.
    asked = PartitionSpec(None if layout == "rows" else "d")
    with jax.set_mesh(devices):
        ours = with_gradients(lambda x, w, key: per_example(x, w, key, out_sharding=asked))
        plain = with_gradients(
            lambda x, w, key: jax.lax.dot_general(
                x, w, (((1,), (0,)), ((), ())), out_sharding=asked
            )
        )
        result, reference = (jax.jit(fn)(*many, key) for fn in (ours, plain))
    assert_all_close(result, jax.jit(with_gradients(per_example))(*one, key))
    assert jax.tree.map(jax.typeof, result) == jax.tree.map(jax.typeof, reference)


def test_an_ambiguous_sharding_is_the_error_of_the_plain_product(key):
    devices, _, many = placed("rows", AxisType.Explicit)
    with jax.set_mesh(devices), pytest.raises(Exception, match="ambiguous how the output should"):
        per_example(*many, key)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_layer_of_ones_own_with_a_mask_for_each_example_of_a_sharded_batch(axis_type, key):
    devices, (x, w), many = placed("data and columns", axis_type)

    def product(x, w):
        return layers.map_examples(lambda x, key: x @ layers.drop_weight(w, key, 0.5), x, key)

    with jax.set_mesh(devices):
        compiled = jax.jit(product).lower(*many).compile()
        assert not re.search(COLLECTIVES, compiled.as_text())
        assert_all_close(compiled(*many), product(x, w))


@pytest.mark.parametrize("layout", ["data", "rows"])
def test_masks_per_example_take_no_kernel_of_memory_on_any_device(layout, key):
    _, _, many = placed(layout, AxisType.Auto, side=SIDE)
    ours, plain = with_gradients(per_example), with_gradients(lambda x, w, key: x @ w)
    memory = [
        jax.jit(fn).lower(*many, key).compile().memory_analysis().temp_size_in_bytes
        for fn in (ours, plain)
    ]
    assert memory[0] - memory[1] < 4 * SIDE * SIDE


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


@pytest.mark.parametrize("options", [{}, {"per_example": True}], ids=["shared", "per example"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_out_sharding_is_that_of_nnx_linear(options, deterministic):
    explicit = mesh(AxisType.Explicit)
    with jax.set_mesh(explicit):
        plain = nnx.Linear(16, 16, use_bias=False, rngs=nnx.Rngs(0))
        plain.kernel.set_value(jax.device_put(plain.kernel[...], NamedSharding(explicit, ROWS)))
        x = jax.device_put(jnp.ones((8, 16)), NamedSharding(explicit, COLUMNS))
        layer = layers.DropConnectLinear(plain, 0.5, **options)
        for asked in (ROWS, COLUMNS):  # Without one of them JAX could not tell.
            y = layer(x, rngs=jax.random.key(0), deterministic=deterministic, out_sharding=asked)
            assert jax.typeof(y) == jax.typeof(plain(x, out_sharding=asked))
            assert jax.typeof(y).sharding.spec == asked


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

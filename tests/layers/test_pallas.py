"""The fused kernel, in Pallas' interpreter, against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import layers
from layers import DropConnectLinear, drop_weight, fused_product

SHAPES = [((3, 5), 7), ((128, 64), 128), ((2, 130, 100), 150), ((65,), 129)]


def problem(shape, columns, dtype="float32"):
    x, w = (
        jax.random.normal(jax.random.key(i), s).astype(dtype)
        for i, s in enumerate([shape, (shape[-1], columns)])
    )
    return x, w, jax.random.key(9)


def plain(x, w, key, rate=0.3):
    return x @ drop_weight(w, key, rate, generator="fast")


def fused(x, w, key, rate=0.3):
    return fused_product(x, w, key, rate, interpret=True)


def assert_close(a, b):
    # Up to 130 products, summed in another order: an error relative to the largest of each array.
    tolerance = 200 * float(jnp.finfo("float32").eps)

    def compare(p, q):
        assert float(jnp.abs(p - q).max()) <= tolerance * max(1.0, float(jnp.abs(q).max()))

    jax.tree.map(compare, a, b)


@pytest.mark.parametrize("shape, columns", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_computes_the_plain_form(shape, columns, dtype):
    x, w, key = problem(shape, columns, dtype)
    ours = fused(x, w, key)
    assert ours.dtype == dtype
    exact = plain(x.astype("float32"), w.astype("float32"), key)
    scale = float(jnp.abs(exact).max())
    # One rounding of each scaled weight and one of the result.
    bound = 4 * float(jnp.finfo(dtype).eps) * scale * np.sqrt(shape[-1])
    assert float(jnp.abs(ours.astype("float32") - exact).max()) < bound


def test_the_mask_in_registers_is_the_mask_in_memory():
    # With the identity for inputs the product is the masked weight itself.
    w, key = jnp.ones((130, 200)), jax.random.key(9)
    ours = fused(jnp.eye(130), w, key, 0.5)
    np.testing.assert_array_equal(ours, drop_weight(w, key, 0.5, generator="fast"))


def test_first_and_second_derivatives_equal_the_plain_form():
    x, w, key = problem((9, 20), 11)

    def derivatives(product):
        def outputs(x, w):
            return jnp.sin(product(x, w, key))

        gradient = jax.grad(lambda x, w: outputs(x, w).sum(), argnums=(0, 1))
        # Not of the sum: where terms cancel, its error is relative to them.
        tangent = jax.jvp(outputs, (x, w), (jnp.cos(x), jnp.cos(w)))
        second = jax.jvp(gradient, (x, w), (jnp.cos(x), jnp.cos(w)))
        twice = jax.grad(lambda w: (gradient(x, w)[1] ** 2).sum())(w)
        return gradient(x, w), tangent, second, twice

    assert_close(derivatives(fused), derivatives(plain))


def test_the_gradient_of_a_dropped_weight_is_exactly_zero():
    x, w, key = problem((9, 20), 11)
    gradient = jax.grad(lambda w: fused(x, w, key).sum())(w)
    mask = layers.keep_mask(key, w.shape, 0.3, generator="fast")
    np.testing.assert_array_equal(gradient != 0, mask)


def test_vmap_over_keys():
    x, w, key = problem((4, 20), 11)
    keys = jax.random.split(key, 3)
    ours = jax.vmap(lambda k: fused(x, w, k))(keys)
    assert_close(ours, jnp.stack([plain(x, w, k) for k in keys]))


def test_the_plain_form_runs_where_there_is_no_accelerator():
    x, w, key = problem((9, 20), 11)
    with jax.default_device(jax.devices("cpu")[0]):
        np.testing.assert_array_equal(fused_product(x, w, key, 0.3), jax.jit(plain)(x, w, key))


@pytest.mark.parametrize("platform, call", [("tpu", "tpu_custom_call"), ("cuda", "triton")])
@pytest.mark.filterwarnings("ignore:.*(Triton|Mosaic).*:DeprecationWarning")
def test_the_kernel_lowers_for_accelerators(platform, call):
    x, w, key = problem((130, 300), 200)
    try:
        text = export.export(
            jax.jit(lambda x, w: fused_product(x, w, key, 0.3)),
            platforms=[platform],
            disabled_checks=[export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")],
        )(x, w).mlir_module()
    except RuntimeError as error:
        if "No supported GPU devices" in str(error):
            pytest.skip("this jax lowers for GPUs only where there is one")
        raise
    assert call in text


def test_a_layer_can_use_it(key):
    linear = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    x = jax.random.normal(key, (2, 3, 6))
    layer = DropConnectLinear(linear, 0.5, generator="fast", fused=True)
    plain_layer = DropConnectLinear(linear, 0.5, generator="fast")
    assert_close(layer(x, rngs=key), plain_layer(x, rngs=key))
    np.testing.assert_array_equal(layer(x, deterministic=True), linear(x))


@pytest.mark.parametrize(
    "options", [{"generator": "default"}, {"generator": "fast", "per_example": True}]
)
def test_a_layer_refuses_what_the_kernel_cannot_do(options):
    linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="fused=True needs generator='fast'"):
        DropConnectLinear(linear, fused=True, **options)


def test_a_layer_refuses_an_out_sharding(key):
    linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    layer = DropConnectLinear(linear, fused=True, generator="fast")
    with pytest.raises(ValueError, match="out_sharding cannot be given with fused=True"):
        layer(jnp.ones((2, 4)), rngs=key, out_sharding="x")


def test_a_layer_refuses_a_product_of_its_own():
    linear = nnx.Linear(4, 4, precision="highest", rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="takes the place of precision, but it is set to 'highest'"
    ):
        DropConnectLinear(linear, fused=True, generator="fast")


@pytest.mark.parametrize(
    "x, w, message",
    [
        (jnp.ones((2, 3)), jnp.ones((4, 5)), r"got \(2, 3\) and \(4, 5\)"),
        (jnp.ones((2, 3)), jnp.ones((3, 5), "bfloat16"), "got float32 and bfloat16"),
    ],
)
def test_shapes_and_dtypes_are_checked(x, w, message, key):
    with pytest.raises(ValueError, match=message):
        fused_product(x, w, key, 0.5)


def test_rate_zero_and_empty_batches(key):
    x, w, _ = problem((3, 5), 7)
    np.testing.assert_array_equal(fused(x, w, key, 0.0), x @ w)
    assert fused(x[:0], w, key).shape == (0, 7)

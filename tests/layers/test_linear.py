"""`DropConnectLinear` against its documented contract and against `nnx.Linear`."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import layers
from layers import DropConnectLinear

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


def base(**options):
    linear = nnx.Linear(4, 5, rngs=nnx.Rngs(0), **options)
    if linear.bias is not None:
        linear.bias[...] = jnp.arange(5.0, dtype=linear.bias.dtype)
    return linear


def make(rate=0.5, rngs=1, **options):
    return DropConnectLinear(base(), rate, rngs=nnx.Rngs(rngs), **options)


def test_the_signature_is_the_documented_one():
    parameters = inspect.signature(DropConnectLinear.__init__).parameters
    assert list(parameters)[1:5] == ["base_layer", "rate", "rng_collection", "rngs"]
    assert parameters["rate"].default == 0.25
    assert parameters["rng_collection"].default == "dropconnect"
    assert parameters["rngs"].default is None
    assert parameters["rng_collection"].kind is inspect.Parameter.KEYWORD_ONLY
    call = inspect.signature(DropConnectLinear.__call__).parameters
    assert list(call)[:4] == ["self", "inputs", "deterministic", "rngs"]


@pytest.mark.parametrize(
    "name, value",
    [
        ("in_features", 4),
        ("out_features", 5),
        ("use_bias", True),
        ("dtype", jnp.float16),
        ("param_dtype", jnp.float32),
        ("precision", jax.lax.Precision.HIGHEST),
        ("preferred_element_type", jnp.float32),
        ("rate", 0.25),
        ("deterministic", False),
        ("rng_collection", "dropconnect"),
        ("rngs", None),
    ],
)
def test_every_documented_attribute_is_carried(name, value):
    linear = base(
        dtype=jnp.float16,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    assert getattr(DropConnectLinear(linear), name) == value


def test_functions_of_the_base_layer_are_carried_or_default():
    layer = DropConnectLinear(base())
    assert layer.dot_general is jax.lax.dot_general
    assert layer.promote_dtype is base().promote_dtype
    assert callable(layer.kernel_init) and callable(layer.bias_init)


def test_kernel_and_bias_are_the_variables_of_the_base_layer():
    linear = base()
    layer = DropConnectLinear(linear)
    assert layer.kernel is linear.kernel and layer.bias is linear.bias


def test_a_wrapped_layer_may_be_wrapped_again():
    first = make(rate=0.5)
    assert DropConnectLinear(first, 0.1).kernel is first.kernel


@pytest.mark.parametrize("wrong", [None, 3, nnx.Conv(1, 1, 1, rngs=nnx.Rngs(0))])
def test_a_base_layer_that_is_not_linear_is_named(wrong):
    with pytest.raises(
        TypeError, match=f"base_layer must be an nnx.Linear, got {type(wrong).__name__}"
    ):
        DropConnectLinear(wrong)


def test_training_masks_the_kernel_scales_it_and_leaves_the_bias(key, generator):
    layer = make(generator=generator)
    mask = layers.keep_mask(key, (4, 5), 0.5, generator=generator)
    expected = X @ jnp.where(mask, layer.kernel[...] * 2.0, 0.0) + layer.bias[...]
    np.testing.assert_array_equal(layer(X, rngs=key), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": False},
        {"dtype": jnp.bfloat16},
        {"dtype": jnp.float16, "preferred_element_type": jnp.float32},
        {"param_dtype": jnp.bfloat16},
        {"precision": "highest"},
        {"promote_dtype": lambda arrays, dtype: tuple(a if a is None else a * 2 for a in arrays)},
        {"dot_general": lambda *a, **k: -jax.lax.dot_general(*a, **k)},
    ],
)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_it_computes_as_nnx_linear_with_the_masked_kernel(options, shape, key):
    linear = base(**options)
    layer = DropConnectLinear(linear, 0.5)
    x = jnp.linspace(-1.0, 1.0, int(np.prod(shape))).reshape(shape)
    deterministic = layer(x, deterministic=True)
    np.testing.assert_array_equal(deterministic, linear(x))
    assert deterministic.dtype == linear(x).dtype
    masked = nnx.clone(linear)
    masked.kernel[...] = layers.drop_weight(linear.kernel[...], key, 0.5)
    np.testing.assert_array_equal(layer(x, rngs=key), masked(x))


def test_every_option_of_the_product_reaches_it_as_from_nnx_linear(key):
    options = {"precision": "highest", "preferred_element_type": jnp.float16}
    seen = []

    def dot(lhs, rhs, dimensions, **given):
        seen.append((dimensions, given))
        return jax.lax.dot_general(lhs, rhs, dimensions)

    linear = base(dot_general=dot, **options)
    accepted = inspect.signature(type(linear).__call__).parameters
    sharding = {"out_sharding": "any"} if "out_sharding" in accepted else {}
    linear(X, **sharding)
    DropConnectLinear(linear, 0.5)(X, rngs=key, **sharding)
    assert seen[0] == seen[1]


def test_a_dot_general_without_the_newer_arguments_serves(key):
    def dot(lhs, rhs, dimensions, precision=None):
        return jax.lax.dot_general(lhs, rhs, dimensions, precision=precision)

    assert DropConnectLinear(base(dot_general=dot), 0.5)(X, rngs=key).shape == (3, 5)


def test_expected_output_is_that_of_the_base_layer(key):
    layer = make(rate=0.3)
    outputs = jax.vmap(lambda k: layer(X, rngs=k))(jax.random.split(key, 4096))
    _, variance = layers.gaussian_moments(layer, X)
    bound = 5 * jnp.sqrt(variance / 4096) + 1e-6
    assert (jnp.abs(outputs.mean(0) - layer(X, deterministic=True)) < bound).all()


# Mode.


def is_masked(layer, **call):
    return bool((layer(X, **call) != layer(X, deterministic=True)).any())


def test_the_argument_none_means_the_attribute():
    layer = make()
    assert is_masked(layer, deterministic=None)
    layer.deterministic = True
    assert not is_masked(layer, deterministic=None)


@pytest.mark.parametrize("attribute", [True, False, None])
@pytest.mark.parametrize("argument", [True, False])
def test_the_argument_overrides_the_attribute(attribute, argument):
    layer = make()
    layer.deterministic = attribute
    assert is_masked(layer, deterministic=argument) is not argument


def test_train_and_eval_switch_the_layer_inside_a_model():
    model = nnx.Sequential(make(), nnx.relu)
    model.eval()
    assert not is_masked(model.layers[0])
    model.train()
    assert is_masked(model.layers[0])


def test_set_attributes_reaches_it_by_type():
    model = nnx.Sequential(make(), nnx.Dropout(0.5))
    model.set_attributes(layers.DropConnectModule, deterministic=True)
    assert model.layers[0].deterministic and not model.layers[1].deterministic


def test_set_mode_sets_the_mode_and_returns_what_it_does_not_know():
    layer = make()
    assert layer.set_mode(deterministic=True, use_running_average=True) == {
        "use_running_average": True
    }
    assert layer.deterministic is True
    assert layer.set_mode() == {} and layer.deterministic is True


@pytest.mark.parametrize("name", ["view", "set_mode"])
def test_views_of_a_model_have_their_own_mode_and_the_same_weights(name):
    if not hasattr(nnx, name):
        pytest.skip(f"this flax has no nnx.{name}")
    model = nnx.Sequential(make(), nnx.BatchNorm(5, rngs=nnx.Rngs(0)))
    view = getattr(nnx, name)(model, deterministic=True, use_running_average=True)
    assert view.layers[0].deterministic and not model.layers[0].deterministic
    assert view.layers[0].kernel is model.layers[0].kernel


def test_view_info_documents_the_mode():
    if not hasattr(nnx, "view_info"):
        pytest.skip("this flax has no nnx.view_info")
    assert "disables dropconnect masking" in nnx.view_info(make())


def test_a_mode_that_nobody_chose_is_an_error():
    layer = make()
    layer.deterministic = None
    with pytest.raises(ValueError, match="deterministic is None as argument and as attribute"):
        layer(X)


# Construction and inverse.


def test_create_builds_what_wrapping_builds():
    made = DropConnectLinear.create(
        4, 5, 0.1, rngs=nnx.Rngs(0), use_bias=False, kernel_init=nnx.initializers.ones
    )
    assert made.bias is None and made.rate == 0.1 and (made.kernel[...] == 1).all()
    assert made.kernel_init is nnx.initializers.ones


def test_to_linear_gives_back_an_equal_layer_with_the_same_variables():
    linear = base(dtype=jnp.float16, precision="highest")
    back = DropConnectLinear(linear).to_linear()
    assert type(back) is nnx.Linear and back.kernel is linear.kernel and back.bias is linear.bias
    assert nnx.graphdef(back) == nnx.graphdef(linear)
    np.testing.assert_array_equal(back(X), linear(X))


def test_options_of_the_wrong_type_are_named():
    with pytest.raises(TypeError, match="per_example must be a bool, got 1"):
        make(per_example=1)


def test_it_has_the_variable_paths_of_the_layer_it_replaces():
    assert set(nnx.to_pure_dict(nnx.state(make(), nnx.Param))) == {"kernel", "bias"}

"""What compat layers do over several calls, and as parts of NNX models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import lifted
from nnx_bridge import capture, compat, to_state, to_variables
from tests.helpers import (
    KEY,
    assert_trees_close,
    assert_trees_equal,
    initialized,
    normal,
    strict,
    total,
)

X = normal(2, 3)


def steps_of_linen(module: nn.Module, variables: Any, inputs: Any, **kwargs: Any) -> Any:
    """The outputs of one call after the other, and the variables at the end."""
    outputs = []
    for x in inputs:
        mutable = [c for c in variables if c != "params"]
        y, updated = module.apply(variables, x, mutable=mutable, **kwargs)
        variables = {**variables, **updated}
        outputs.append(y)
    return outputs, variables


def test_batch_norm_keeps_the_statistics_of_linen_over_several_steps() -> None:
    linen = nn.BatchNorm(use_running_average=False, dtype=jnp.bfloat16)
    variables = initialized(linen, X)
    layer = compat.BatchNorm(3, use_running_average=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(layer, to_state(variables))
    inputs = [normal(4, 3, seed=i) for i in range(3)]
    expected = steps_of_linen(linen, variables, inputs)
    assert_trees_equal(([layer(x) for x in inputs], to_variables(nnx.state(layer))), expected)


def test_spectral_norm_keeps_the_estimates_of_linen_over_several_steps() -> None:
    linen = nn.SpectralNorm(nn.Dense(4))
    variables = linen.init(KEY, X, update_stats=False)
    layer = compat.SpectralNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    nnx.update(layer, to_state(variables))
    inputs = [normal(4, 3, seed=i) for i in range(3)]
    expected = steps_of_linen(linen, variables, inputs, update_stats=True)
    outputs = [layer(x, update_stats=True) for x in inputs]
    assert_trees_equal((outputs, to_variables(nnx.state(layer))), expected)


def test_decoding_step_by_step_writes_the_cache_of_linen() -> None:
    linen = nn.MultiHeadDotProductAttention(2, decode=True)
    variables = linen.init(KEY, jnp.ones((1, 4, 8)))
    layer = compat.MultiHeadDotProductAttention(2, 8, decode=True, rngs=nnx.Rngs(0))
    layer.init_cache((1, 4, 8))
    assert jax.tree.map(jnp.shape, to_variables(nnx.state(layer))) == jax.tree.map(
        jnp.shape, variables
    )
    nnx.update(layer, to_state(variables))
    inputs = [normal(1, 1, 8, seed=i) for i in range(3)]
    expected = steps_of_linen(linen, variables, inputs)
    assert_trees_equal(([layer(x) for x in inputs], to_variables(nnx.state(layer))), expected)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("GRUCell", {}),
        ("OptimizedLSTMCell", {"reverse": True, "keep_order": True}),
        ("MGUCell", {"time_major": True}),
    ],
)
def test_cells_run_in_the_rnn_of_nnx(name: str, settings: Any) -> None:
    linen = nn.RNN(getattr(nn, name)(4), **settings)
    x, lengths = normal(2, 5, 3), None if settings.get("time_major") else jnp.array([5, 2])
    variables = initialized(linen, x)
    layer = nnx.RNN(getattr(compat, name)(3, 4, rngs=nnx.Rngs(0)), **settings)
    nnx.update(layer, to_state(variables))
    expected = linen.apply(variables, x, seq_lengths=lengths)
    assert_trees_equal(layer(x, seq_lengths=lengths), expected)


def test_the_carry_of_a_key_is_that_of_linen() -> None:
    init = nn.initializers.normal()
    linen = nn.LSTMCell(4, carry_init=init).initialize_carry(KEY, (2, 3))
    cell = compat.LSTMCell(3, 4, carry_init=init, rngs=nnx.Rngs(0))
    assert_trees_equal(cell.initialize_carry((2, 3), KEY), linen)


@pytest.mark.parametrize("update_stats", [None, False, True])
def test_a_call_leaves_the_weights_of_the_layer_inside_as_they_are(update_stats: Any) -> None:
    dense = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    if update_stats is None:
        layer, kwargs = compat.WeightNorm(dense, rngs=nnx.Rngs(1)), {}
    else:
        layer = compat.SpectralNorm(dense, rngs=nnx.Rngs(1))  # type: ignore[assignment]
        kwargs = {"update_stats": update_stats}
    dense.kernel.set_value(normal(3, 4))
    layer(X, **kwargs)
    assert_trees_equal(dense.kernel[...], normal(3, 4))


def test_what_the_layer_inside_writes_is_kept() -> None:
    norm = compat.BatchNorm(3, use_running_average=False, rngs=nnx.Rngs(0))
    layer = compat.WeightNorm(norm, variable_filter={"scale"}, rngs=nnx.Rngs(1))
    layer(X)
    expected = compat.BatchNorm(3, use_running_average=False, rngs=nnx.Rngs(0))
    expected(X)
    assert_trees_equal(norm.mean[...], expected.mean[...])


def test_a_layer_inside_that_fails_leaves_everything_as_it_was() -> None:
    layer = compat.SpectralNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    before = nnx.to_pure_dict(nnx.clone(nnx.state(layer.layer_instance)))
    with pytest.raises(TypeError, match="dot_general"):
        layer(jnp.ones((2, 5)), update_stats=True)
    assert_trees_equal(nnx.to_pure_dict(nnx.state(layer.layer_instance)), before)


def test_derivatives_may_close_over_a_reparametrized_layer() -> None:
    layer = compat.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    with strict():
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(layer(x))))(X)
    kernel = layer.layer_instance.kernel[...]
    unit = kernel / jnp.linalg.norm(kernel, axis=0)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(x @ unit)))(X)
    assert jnp.allclose(gradient, expected, atol=1e-6)


def test_sown_weights_are_captured() -> None:
    layer = compat.SelfAttention(2, 8, rngs=nnx.Rngs(0))
    x = normal(1, 5, 8)
    _, captured = capture(lambda m, x: m(x, sow_weights=True), nnx.Intermediate)(layer, x)
    variables = to_variables(nnx.state(layer))
    linen = nn.MultiHeadDotProductAttention(2)
    _, expected = linen.apply(variables, x, sow_weights=True, mutable=["intermediates"])
    got = captured["attention_weights"]
    assert_trees_equal(got.get_value(), expected["intermediates"]["attention_weights"])


def test_training_and_evaluation_are_set_for_the_whole_model() -> None:
    model = compat.Sequential(
        [compat.BatchNorm(3, rngs=nnx.Rngs(0)), compat.Dropout(0.5, rngs=nnx.Rngs(0))]
    )
    model.eval()
    assert_trees_equal(model(X), compat.BatchNorm(3, rngs=nnx.Rngs(0))(X, True))
    model.train()
    assert bool((model(X) == 0).any())


def test_dropout_of_attention_keeps_a_stream_of_its_own() -> None:
    layer = compat.MultiHeadAttention(2, 8, dropout_rate=0.5, deterministic=False, rngs=nnx.Rngs(0))
    x = normal(1, 5, 8)
    first, second = layer(x), layer(x)
    assert not jnp.allclose(first, second)
    assert_trees_equal(layer(x, dropout_rng=KEY), layer(x, dropout_rng=KEY))


def test_compat_layers_work_in_transforms_of_nnx_and_of_lifted() -> None:
    model = compat.Sequential(
        [compat.LayerNorm(3, rngs=nnx.Rngs(0)), compat.BatchNorm(3, rngs=nnx.Rngs(0))]
    )
    model.train()
    x = normal(8, 3)
    plain = nnx.clone(model)
    expected = jax.grad(lambda x: total(nnx.clone(plain), x))(x)
    with strict():
        _, (gradient,) = lifted.value_and_grad(total, model, x)
        compiled = nnx.jit(nnx.grad(total, argnums=1))(nnx.clone(plain), x)
    assert_trees_close(gradient, expected)
    assert_trees_close(compiled, expected)


def test_batch_apply_merges_leading_axes() -> None:
    layer = compat.BatchApply(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    x = normal(2, 5, 3)
    expected = nn.BatchApply(lambda x: layer.f(x))(x)
    assert_trees_equal(layer(x), expected)
    assert nnx.state(layer)["f"]["kernel"].shape == (3, 4)


def test_an_8_bit_product_returns_its_next_scales_as_gradients() -> None:
    product = compat.Fp8DirectDotGeneralOp()
    dense = nnx.Linear(3, 4, dot_general=product, rngs=nnx.Rngs(0))
    collection = type(product.input_scale)
    gradients = nnx.grad(lambda m: m(X).sum(), argnums=nnx.DiffState(0, collection))(dense)
    nnx.update(dense, gradients)
    assert float(product.input_amax_history[...][0]) == float(jnp.abs(X).max())


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: compat.BatchNorm(3, rngs=nnx.Rngs(0))(X),
            ValueError,
            "use_running_average: BatchNorm must be told",
        ),
        (
            lambda: compat.LayerNorm(3, feature_axes=(-2, -1), rngs=nnx.Rngs(0)),
            ValueError,
            "num_features: LayerNorm has the feature axes",
        ),
        (
            lambda: compat.MultiHeadAttention(3, 8, rngs=nnx.Rngs(0)),
            ValueError,
            "num_heads: 3 heads cannot share 8",
        ),
        (
            lambda: compat.SelfAttention(2, 8, decode=True, rngs=nnx.Rngs(0))(jnp.ones((1, 1, 8))),
            ValueError,
            "decode: SelfAttention has no cache yet; call init_cache",
        ),
        (
            lambda: compat.MultiHeadAttention(2, 8, dropout_rate=0.1, rngs=nnx.Rngs(0))(
                jnp.ones((1, 2, 8))
            ),
            ValueError,
            "deterministic: MultiHeadAttention must be told",
        ),
        (
            lambda: compat.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0))(
                jnp.ones((1, 2, 8)), inputs_v=jnp.ones((1, 2, 8))
            ),
            ValueError,
            "inputs_v: without inputs_k",
        ),
        (lambda: compat.Sequential([]), ValueError, "at least one module"),
        (lambda: compat.Sequential({}), TypeError, "expected a sequence of modules"),
        (
            lambda: compat.SpectralNorm(
                nnx.Conv(2, 3, (2,), rngs=nnx.Rngs(0)), error_on_non_matrix=True, rngs=nnx.Rngs(0)
            ),
            ValueError,
            r"layer_instance/kernel: expected a matrix, got shape \(2, 2, 3\)",
        ),
        (
            lambda: compat.ConvLocal(
                2, 3, (2, 2), spatial_shape=(4, 4), padding="CAUSAL", rngs=nnx.Rngs(0)
            ),
            ValueError,
            "Causal padding is only implemented for 1D",
        ),
        (lambda: compat.Dropout(0.5)(X), ValueError, "deterministic"),
    ],
)
def test_misuse_is_an_error_that_says_what_to_do(make: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_statistics_over_a_named_axis_are_those_of_linen() -> None:
    linen = nn.BatchNorm(use_running_average=False, axis_name="devices")
    variables = initialized(linen.clone(axis_name=None), X)
    layer = compat.BatchNorm(3, use_running_average=False, axis_name="devices", rngs=nnx.Rngs(0))
    graphdef, _ = nnx.split(layer)

    def ours(x: jax.Array) -> Any:
        copy = nnx.merge(graphdef, to_state(variables), copy=True)
        return copy(x), to_variables(nnx.state(copy))["batch_stats"]

    def expected(x: jax.Array) -> Any:
        y, updated = linen.apply(variables, x, mutable=["batch_stats"])
        return y, updated["batch_stats"]

    x = normal(2, 4, 3)
    assert_trees_equal(
        jax.vmap(ours, axis_name="devices")(x), jax.vmap(expected, axis_name="devices")(x)
    )

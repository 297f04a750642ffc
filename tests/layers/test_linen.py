"""The Linen twins: equal masks for equal keys, and Linen's own rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import layers
from layers import linen
from tests.helpers import assert_trees_equal

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
RATE = 0.4


def dense_pair(**options):
    """A Linen layer with its variables, and the NNX layer of the same weights."""
    dense = linen.DropConnectDense(5, rate=RATE, **options)
    variables = dense.init(jax.random.key(0), X)
    options.pop("use_bias", None)
    per = {k: options.pop(k) for k in ("generator", "per_example") if k in options}
    base = nnx.Linear(4, 5, rngs=nnx.Rngs(0), **options)
    nnx.update(base, variables["params"])
    return dense, variables, layers.DropConnectLinear(base, RATE, **per)


@pytest.mark.parametrize(
    "options", [{}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.float16}, {"per_example": True}]
)
def test_both_dense_layers_agree_bit_by_bit(options, generator, key):
    dense, variables, layer = dense_pair(generator=generator, **options)
    np.testing.assert_array_equal(dense.apply(variables, X, rng=key), layer(X, rngs=key))


def test_gradients_agree_bit_by_bit(key):
    dense, variables, layer = dense_pair()
    a = jax.grad(lambda v: jnp.sin(dense.apply(v, X, rng=key)).sum())(variables)["params"]
    b = nnx.grad(lambda m: jnp.sin(m(X, rngs=key)).sum())(layer)
    assert_trees_equal(a, nnx.to_pure_dict(b))


def test_its_variables_are_those_of_dense():
    _, variables, _ = dense_pair()
    expected = nn.Dense(5).init(jax.random.key(0), X)
    assert_trees_equal(variables, expected)


def test_no_key_is_needed_to_initialise_or_when_deterministic():
    dense, variables, _ = dense_pair()
    plain = nn.Dense(5).apply(variables, X)
    np.testing.assert_array_equal(dense.apply(variables, X, deterministic=True), plain)
    for still in (dense.clone(rate=0.0), dense.clone(deterministic=True)):
        np.testing.assert_array_equal(still.apply(variables, X), plain)


def test_the_argument_overrides_the_attribute(key):
    dense, variables, _ = dense_pair()
    masked = dense.apply(variables, X, rng=key)
    still = dense.clone(deterministic=True)
    np.testing.assert_array_equal(still.apply(variables, X, deterministic=False, rng=key), masked)


def test_a_missing_key_says_how_to_give_one():
    dense, variables, _ = dense_pair()
    with pytest.raises(ValueError, match="DropConnectDense needs a key.*'dropconnect': key"):
        dense.apply(variables, X)


def test_a_bad_rate_and_a_bad_generator_are_named(key):
    dense, variables, _ = dense_pair()
    with pytest.raises(ValueError, match="rate must be in.*got 1.0"):
        dense.clone(rate=1.0).apply(variables, X, rng=key)
    with pytest.raises(ValueError, match="generator must be one of.*got 'x'"):
        dense.clone(generator="x").apply(variables, X, rng=key)


def test_the_stream_gives_a_mask_to_each_layer():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = linen.DropConnectDense(4, rate=0.5, use_bias=False)
            return layer(x), layer(x)

    variables = Model().init(jax.random.key(0), X)
    a, b = Model().apply(variables, X, rngs={"dropconnect": jax.random.key(1)})
    assert (a != b).any()


def test_it_runs_under_scan_and_vmap():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.scan(
                lambda layer, x, _: (layer(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropconnect": True},
                length=3,
            )
            return body(linen.DropConnectDense(4, rate=0.5), x, None)[0]

    variables = Stack().init(jax.random.key(0), X)
    rngs = {"dropconnect": jax.random.key(1)}
    assert Stack().apply(variables, X, rngs=rngs).shape == X.shape
    assert jax.vmap(lambda k: Stack().apply(variables, X, rngs={"dropconnect": k}))(
        jax.random.split(jax.random.key(1), 2)
    ).shape == (2, *X.shape)


# The wrapper.


def lstm_pair():
    wrapped = linen.WeightDrop(nn.RNN(nn.LSTMCell(5)), RATE, params=layers.hidden_to_hidden)
    x = jax.random.normal(jax.random.key(3), (2, 6, 4))
    variables = wrapped.init(jax.random.key(0), x)
    rnn = nnx.RNN(nnx.LSTMCell(4, 5, rngs=nnx.Rngs(0)))
    for name, values in variables["params"]["base_layer"]["cell"].items():
        nnx.update(getattr(rnn.cell, {"if": "if_"}.get(name, name)), values)
    return wrapped, variables, rnn, x


@pytest.mark.parametrize("params", [layers.hidden_to_hidden, layers.is_weight])
def test_recurrent_layers_agree_bit_by_bit(params, key):
    wrapped, variables, rnn, x = lstm_pair()
    wrapped = wrapped.clone(params=params)
    layer = layers.WeightDrop(rnn, RATE, params=params)
    np.testing.assert_array_equal(wrapped.apply(variables, x, rng=key), layer(x, rngs=key))


def test_convolutions_agree_bit_by_bit(key):
    x = jax.random.normal(key, (2, 5, 5, 3))
    wrapped = linen.WeightDrop(nn.Conv(4, (3, 3)), RATE)
    variables = wrapped.init(jax.random.key(0), x)
    conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    nnx.update(conv, variables["params"]["base_layer"])
    np.testing.assert_array_equal(
        wrapped.apply(variables, x, rng=key), layers.WeightDrop(conv, RATE)(x, rngs=key)
    )


def test_deterministic_reaches_a_base_layer_that_has_it(key):
    x, base = jnp.ones((1, 3, 4)), nn.MultiHeadAttention(2, qkv_features=4, dropout_rate=0.5)
    model = linen.WeightDrop(base, RATE)
    variables = model.init(jax.random.key(0), x, deterministic=True)
    plain = base.apply({"params": variables["params"]["base_layer"]}, x, deterministic=True)
    np.testing.assert_array_equal(model.apply(variables, x, deterministic=True), plain)
    rngs = {"dropconnect": key, "dropout": key}
    assert (model.apply(variables, x, deterministic=False, rngs=rngs) != plain).any()


@pytest.mark.parametrize("lift", [nn.remat, nn.jit], ids=["remat", "jit"])
def test_it_differentiates_under_linens_own_transforms(lift, key):
    def gradient(dense, wrapped):
        model = nn.Sequential([dense(4, rate=RATE), wrapped(nn.Dense(3), RATE)])
        variables = model.init(jax.random.key(0), X)
        rngs = {"dropconnect": key}
        return jax.grad(lambda v: (model.apply(v, X, rngs=rngs) ** 2).sum())(variables)

    lifted = gradient(lift(linen.DropConnectDense), lift(linen.WeightDrop))
    for leaf in jax.tree.leaves(lifted):
        assert jnp.isfinite(leaf).all() and (leaf != 0).any()


def test_a_base_layer_may_also_be_used_without_masks(key):
    class Model(nn.Module):
        def setup(self):
            self.plain = nn.Dense(4)
            self.wrapped = linen.WeightDrop(self.plain, RATE)

        def __call__(self, x):
            return self.wrapped(x), self.plain(x)

    variables = Model().init(jax.random.key(0), X)
    masked, plain = Model().apply(variables, X, rngs={"dropconnect": key})
    assert set(variables["params"]) == {"plain"} and (masked != plain).any()
    np.testing.assert_array_equal(
        plain, nn.Dense(4).apply({"params": variables["params"]["plain"]}, X)
    )


def test_batch_statistics_are_updated(key):
    model = linen.WeightDrop(nn.Sequential([nn.Dense(4), nn.BatchNorm(False)]), RATE)
    variables = model.init(jax.random.key(0), X)
    _, updates = model.apply(variables, X, rng=key, mutable=["batch_stats"])
    before, after = (jax.tree.leaves(v["batch_stats"]) for v in (variables, updates))
    assert any((a != b).any() for a, b in zip(before, after, strict=True))


def test_other_methods_can_be_called(key):
    model = linen.WeightDrop(nn.Embed(7, 4), RATE)
    variables = model.init(jax.random.key(0), jnp.array([1]))
    table = variables["params"]["base_layer"]["embedding"]

    def attend(model, x, **options):
        return model(x, method="attend", **options)

    attended = model.apply(variables, X, rng=key, method=attend)
    np.testing.assert_array_equal(attended, X @ layers.drop_weight(table, key, RATE).T)


def test_fields_and_methods_are_reached_through_the_wrapper(key):
    model = linen.WeightDrop(nn.Embed(7, 4), RATE)
    variables = model.init(jax.random.key(0), jnp.array([1]))
    table = variables["params"]["base_layer"]["embedding"]
    assert model.features == 4
    attended = model.apply(variables, X, rng=key, method=lambda m, x, rng: m.attend(x, rng=rng))
    np.testing.assert_array_equal(attended, X @ layers.drop_weight(table, key, RATE).T)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = model.nothing_of_the_kind


def test_around_a_cell_each_step_has_a_mask_of_its_own(key):
    cell = linen.WeightDrop(nn.SimpleCell(4, activation_fn=lambda x: x), RATE, params="i/kernel")
    rnn = nn.RNN(cell, split_rngs={"params": False, "dropconnect": True})
    x = jnp.ones((1, 3, 4))
    variables = rnn.init(jax.random.key(0), x)
    variables["params"]["cell"]["base_layer"]["h"]["kernel"] *= 0
    steps = rnn.apply(variables, x, rngs={"dropconnect": key})[0]
    assert len({step.tobytes() for step in np.asarray(steps)}) == 3


def test_boxes_of_partitioned_parameters_survive(key):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    dense = linen.DropConnectDense(5, rate=RATE, kernel_init=init)
    wrapped = linen.WeightDrop(nn.Dense(5, kernel_init=init), RATE)
    for model in (dense, wrapped):
        variables = model.init(jax.random.key(0), X)
        assert isinstance(
            jax.tree.leaves(variables, is_leaf=lambda v: isinstance(v, nn.Partitioned))[-1],
            nn.Partitioned,
        )
        boxed = model.apply(variables, X, rng=key)
        np.testing.assert_array_equal(boxed, model.apply(nn.unbox(variables), X, rng=key))
    assert isinstance(
        linen.drop_params(dense.init(jax.random.key(0), X)["params"], key, RATE)["kernel"],
        nn.Partitioned,
    )


def test_selecting_nothing_lists_what_there_is(key):
    with pytest.raises(ValueError, match="select='x' selects nothing; there is: bias, kernel"):
        linen.drop_params({"kernel": X, "bias": X[0]}, key, RATE, select="x")


def test_no_tracer_leaks(key):
    dense, variables, _ = dense_pair()
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda v: dense.apply(v, X, rng=key).sum()))(variables)


def test_a_sequence_of_layers_has_the_masks_of_its_nnx_twin(key):
    wrapped = linen.WeightDrop(nn.Sequential([nn.Dense(4), nn.Dense(4)]), RATE)
    variables = wrapped.init(jax.random.key(0), X)
    dense = nnx.Sequential(*(nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2)))
    for i, values in enumerate(variables["params"]["base_layer"].values()):
        nnx.update(dense.layers[i], values)
    twin = layers.WeightDrop(dense, RATE)
    np.testing.assert_array_equal(wrapped.apply(variables, X, rng=key), twin(X, rngs=key))

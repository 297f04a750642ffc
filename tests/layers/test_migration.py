"""A Linen model with DropConnect, its NNX migration, and the transforms of `lifted` over both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import layers
import lifted
import nnx_bridge
from layers import linen
from tests.helpers import Inside, assert_trees_equal, initialized, normal

pytestmark = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
RATE = 0.4
X = normal(2, 5, 5, 3)


class Linen(nn.Module):
    generator: str = "default"

    def setup(self):
        self.conv = linen.WeightDrop(nn.Conv(4, (3, 3)), RATE, generator=self.generator)
        self.hidden = linen.DropConnectDense(6, rate=RATE, generator=self.generator)
        self.head = linen.DropConnectDense(2, rate=RATE, per_example=True)

    def __call__(self, x, key=None):
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = nn.relu(self.conv(x, rng=keys[0])).mean((1, 2))
        x = nn.tanh(self.hidden(x, rng=keys[1]))
        self.sow("intermediates", "features", x)
        return self.head(x, rng=keys[2])


class NNX(nnx.Module):
    """The same by hand: the variables have the same paths."""

    def __init__(self, generator="default"):
        rngs = nnx.Rngs(0)
        conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.conv = layers.WeightDrop(conv, RATE, generator=generator)
        self.hidden = layers.DropConnectLinear.create(4, 6, RATE, rngs=rngs, generator=generator)
        self.head = layers.DropConnectLinear.create(6, 2, RATE, rngs=rngs, per_example=True)

    def __call__(self, x, key):
        keys = jax.random.split(key, 3)
        x = nnx.relu(self.conv(x, rngs=keys[0])).mean((1, 2))
        x = nnx.tanh(self.hidden(x, rngs=keys[1]))
        self.sow(nnx.Intermediate, "features", x)
        return self.head(x, rngs=keys[2])


def pair(generator="default"):
    """The Linen model bound to its variables, and the NNX model of the same weights."""
    variables = {"params": initialized(Linen(generator), X)["params"]}
    model = NNX(generator)
    nnx.update(model, variables["params"])
    return Linen(generator).bind(variables), model


def call(mdl, x, key):
    return mdl(x, key)


def loss(mdl, x, key):
    return jnp.sin(mdl(x, key)).sum()


def test_the_models_agree_bit_by_bit_in_training(generator, key):
    module, model = pair(generator)
    np.testing.assert_array_equal(module(X, key), model(X, key))


def test_the_models_agree_bit_by_bit_in_gradients(generator, key):
    module, model = pair(generator)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def of_linen(params, x):
        return loss(Linen(generator).bind({"params": params}), x, key)

    def of_nnx(params, x):
        return loss(nnx.merge(graphdef, params, rest), x, key)

    expected = jax.grad(of_linen, argnums=(0, 1))(module.variables["params"], X)
    gradients, t_x = jax.grad(of_nnx, argnums=(0, 1))(params, X)
    assert_trees_equal((nnx.to_pure_dict(gradients), t_x), expected)


def test_lifted_grad_agrees_on_both_and_with_raw_jax(key):
    module, model = pair()
    raw = jax.grad(lambda v: loss(Linen().bind(v), X, key))(module.variables)["params"]
    (of_linen, *x_linen), (of_nnx, *x_nnx) = (
        lifted.grad(loss, mdl, X, key, grad_variables="params", argnums=(0,)) for mdl in pair()
    )
    assert_trees_equal(of_linen["params"], raw)
    assert_trees_equal(nnx.to_pure_dict(of_nnx), raw)
    assert_trees_equal(x_linen, x_nnx)


def test_lifted_jvp_agrees_on_both_and_with_raw_jax(key):
    module, model = pair()
    params = module.variables["params"]
    t_params, t_x = jax.tree.map(jnp.cos, params), jnp.cos(X)
    t_key = np.zeros((), jax.dtypes.float0)
    raw = jax.jvp(lambda p, x: Linen().apply({"params": p}, x, key), (params, X), (t_params, t_x))
    for mdl in (module, model):
        tangents = {"params": t_params}
        assert_trees_equal(lifted.jvp(call, mdl, (X, key), (t_x, t_key), tangents), raw)


def test_lifted_transforms_inside_a_linen_model_draw_the_mask_of_the_plain_call(key):
    dense, x = linen.DropConnectDense(5, rate=RATE), normal(3, 4)
    variables, rngs = Inside(dense, lambda m, x: m(x)).init(key, x), {"dropconnect": key}

    def inside(use):
        return Inside(dense, use).apply(variables, x, rngs=rngs)

    plain = inside(lambda m, x: m(x))
    y, tangent = inside(lambda m, x: lifted.jvp(lambda m, x: m(x), m, (x,), (x,), {}))
    np.testing.assert_array_equal(y, plain)
    # Linear in x but for the bias, which is zero.
    np.testing.assert_array_equal(tangent, plain)
    value, (t_x,) = inside(
        lambda m, x: lifted.value_and_grad(lambda m, x: (m(x) ** 2).sum() / 2, m, x)
    )
    np.testing.assert_array_equal(value, (plain**2).sum() / 2)
    assert t_x.shape == x.shape


def test_lifted_transforms_move_the_counter_of_an_nnx_layer_once():
    layer = layers.DropConnectLinear.create(4, 5, 0.5, rngs=nnx.Rngs(0))
    x, copy = normal(3, 4), nnx.clone(layer)
    y, _ = lifted.jvp(lambda m, x: m(x), layer, (x,), (x,), {})
    np.testing.assert_array_equal(y, copy(x))
    assert int(layer.rngs.count[...]) == 1


class Streams(nn.Module):
    """Keys from the stream, as most models take them."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(linen.DropConnectDense(8, rate=RATE)(x))
        return linen.WeightDrop(nn.Dense(3), RATE)(x)


def test_a_hosted_model_is_the_linen_model(key):
    x = normal(3, 4)
    variables = Streams().init(jax.random.key(0), x)
    host = nnx_bridge.Host(Streams(), variables, rngs={"dropconnect": key})
    for step in range(2):
        rngs = {"dropconnect": jax.random.fold_in(key, step)}
        np.testing.assert_array_equal(host(x), Streams().apply(variables, x, rngs=rngs))


def test_the_equivalence_check_passes_a_model_with_dropconnect():
    case = nnx_bridge.Case(Streams(), (normal(3, 4),), rngs=("params", "dropconnect"))
    nnx_bridge.check(case).assert_equal()


def test_captures_of_both_hold_the_same_values_and_gradients(key):
    module, model = pair()
    results = [
        nnx_bridge.capture_grad(lambda m, x: loss(m, x, key), mdl, X) for mdl in (module, model)
    ]
    of_linen, of_nnx = (jax.tree.leaves(result.intermediates) for result in results)
    assert_trees_equal(of_nnx, of_linen)


@pytest.mark.parametrize("mode", [{"deterministic": True}, {}])
def test_the_plain_models_agree_when_deterministic(mode):
    dense = linen.DropConnectDense(5, rate=RATE)
    variables = dense.init(jax.random.key(0), X)
    linear = layers.DropConnectLinear.create(3, 5, RATE, rngs=nnx.Rngs(0))
    nnx.update(linear, variables["params"])
    if not mode:
        dense = dense.clone(deterministic=True)
        linear.eval()
    np.testing.assert_array_equal(dense.apply(variables, X, **mode), linear(X, **mode))

"""`WeightDrop` and `drop_weights` around the layers of Flax and around models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import layers
from layers import WeightDrop, drop_weights
from layers._select import weight_keys

RATE = 0.5


def rngs():
    return nnx.Rngs(0)


ATTENTION = {"num_heads": 2, "in_features": 4, "decode": False}
LAYERS = {
    "linear": (lambda: nnx.Linear(4, 6, rngs=rngs()), (3, 4), ["kernel"]),
    "general": (
        lambda: nnx.LinearGeneral((2, 4), (3, 2), axis=(-2, -1), rngs=rngs()),
        (3, 2, 4),
        ["kernel"],
    ),
    "einsum": (lambda: nnx.Einsum("bi,io->bo", (4, 6), (6,), rngs=rngs()), (3, 4), ["kernel"]),
    "conv": (lambda: nnx.Conv(4, 6, (3, 3), rngs=rngs()), (2, 5, 5, 4), ["kernel"]),
    "transpose": (lambda: nnx.ConvTranspose(4, 6, (3,), rngs=rngs()), (2, 5, 4), ["kernel"]),
    "attention": (
        lambda: nnx.MultiHeadAttention(**ATTENTION, rngs=rngs()),
        (2, 3, 4),
        ["key/kernel", "out/kernel", "query/kernel", "value/kernel"],
    ),
    "lora": (lambda: nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs()), (3, 4), None),
}


@pytest.fixture(params=LAYERS)
def case(request):
    build, shape, names = LAYERS[request.param]
    return build(), jax.random.normal(jax.random.key(0), shape), names


def written_out(module, key, names, rate=RATE):
    """A copy whose kernels hold their masked values."""
    copy = nnx.clone(module)
    leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(copy))}
    keys = weight_keys(key, [tuple(name.split("/")) for name in names])
    for name in names:
        leaf = leaves[name]
        leaf[...] = layers.drop_weight(leaf[...], keys[tuple(name.split("/"))], rate)
    return copy


def test_every_layer_computes_with_its_masked_weights(case, key):
    base, x, names = case
    if names is None:
        pytest.skip("only its training matters")
    expected = written_out(base, key, names)(x)
    np.testing.assert_array_equal(WeightDrop(base, RATE)(x, rngs=key), expected)


def test_every_layer_is_plain_when_deterministic(case):
    base, x, _ = case
    layer = WeightDrop(base, RATE)
    np.testing.assert_array_equal(layer(x, deterministic=True), base(x))
    layer.eval()
    np.testing.assert_array_equal(layer(x), base(x))


def test_every_layer_trains_in_a_compiled_step(case):
    base, x, _ = case
    layer = WeightDrop(base, RATE, rngs=nnx.Rngs(1))
    grads = nnx.jit(lambda m, x: nnx.grad(lambda m: (m(x) ** 2).sum())(m))(layer, x)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert int(layer.rngs.count[...]) == 1


def test_a_lone_weight_has_the_mask_of_dropconnect_linear(key, generator):
    base, x = nnx.Linear(4, 6, rngs=rngs()), jnp.ones((3, 4))
    wrapped = WeightDrop(base, RATE, generator=generator)(x, rngs=key)
    linear = layers.DropConnectLinear(base, RATE, generator=generator)(x, rngs=key)
    np.testing.assert_array_equal(wrapped, linear)


def test_gradients_equal_the_mask_written_out(key):
    base, x = nnx.Conv(2, 3, (3,), rngs=rngs()), jax.random.normal(key, (2, 5, 2))
    gradient = nnx.grad(lambda m: jnp.sin(m(x, rngs=key)).sum())(WeightDrop(base, RATE))
    mask = layers.keep_mask(key, base.kernel.shape, RATE)

    def raw(kernel):
        copy = nnx.clone(base)
        copy.kernel[...] = jnp.where(mask, kernel * 2.0, 0.0)
        return jnp.sin(copy(x)).sum()

    expected = jax.grad(raw)(base.kernel[...])
    np.testing.assert_array_equal(gradient["base_layer"]["kernel"][...], expected)


def test_the_weights_of_the_base_layer_are_never_written(key):
    base = nnx.Linear(4, 6, rngs=rngs())
    before = base.kernel[...]
    WeightDrop(base, RATE)(jnp.ones((1, 4)), rngs=key)
    assert base.kernel[...] is before


class Block(nnx.Module):
    """Everything that a call can write."""

    def __init__(self):
        self.linear = nnx.Linear(4, 4, rngs=rngs())
        self.norm = nnx.BatchNorm(4, rngs=rngs())
        self.dropout = nnx.Dropout(0.5, rngs=rngs())
        self.calls = nnx.Variable(jnp.zeros((), int))
        self.again = self.linear  # shared

    def __call__(self, x):
        self.calls[...] += 1
        return self.dropout(self.norm(self.again(self.linear(x))))

    def features(self, x):
        return self.linear(x)

    def fails(self, x):
        self.memory = nnx.Variable(x)
        raise RuntimeError("on purpose")

    def remembers(self, x):
        self.memory = nnx.Variable(x)
        return self.linear(x)


def test_all_other_state_is_written_as_by_a_plain_call(key):
    base = Block()
    WeightDrop(base, RATE)(jnp.ones((2, 4)), rngs=key)
    assert int(base.calls[...]) == 1 and int(base.dropout.rngs.count[...]) == 1
    assert (base.norm.mean[...] != 0).any()


def test_a_shared_weight_has_one_mask(key):
    dropped = drop_weights(Block(), key, RATE)
    assert dropped.linear is dropped.again


def test_other_methods_run_with_masked_weights(key):
    base, x = Block(), jnp.ones((2, 4))
    expected = x @ layers.drop_weight(base.linear.kernel[...], key, RATE) + base.linear.bias[...]
    np.testing.assert_array_equal(WeightDrop(base, RATE).features(x, rngs=key), expected)


def test_plain_attributes_are_reached_through_the_wrapper():
    layer = WeightDrop(nnx.Conv(2, 3, (3,), rngs=rngs()), RATE)
    assert layer.out_features == 3
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = layer.nothing_of_the_kind


def test_attributes_that_a_call_creates_reach_the_base_layer(key):
    layer = WeightDrop(Block(), RATE)
    layer.remembers(jnp.ones((2, 4)), rngs=key)
    assert (layer.base_layer.memory[...] == 1).all()


def test_a_cache_can_be_made_through_the_wrapper(key):
    base = nnx.MultiHeadAttention(2, 4, decode=True, rngs=rngs())
    layer = WeightDrop(base, RATE, rngs=key)
    layer.init_cache((1, 3, 4))
    layer(jnp.ones((1, 1, 4)))
    assert int(base.cache_index[...]) == 1


def test_an_exception_leaves_the_module_as_it_was(key):
    base = Block()
    before, kernel = nnx.graphdef(base), base.linear.kernel
    with pytest.raises(RuntimeError, match="on purpose"):
        WeightDrop(base, RATE).fails(jnp.ones((2, 4)), rngs=key)
    assert nnx.graphdef(base) == before and base.linear.kernel is kernel
    assert not hasattr(base, "memory")


def test_sown_values_reach_a_capture_and_perturbations_have_gradients(key):
    class Sower(Block):
        def __call__(self, x):
            y = self.perturb("p", self.linear(x))
            self.sow(nnx.Intermediate, "y", y)
            return y

    layer, x = WeightDrop(Sower(), RATE), jnp.ones((2, 4))
    output, sown = nnx.capture(layer, nnx.Intermediate)(x, rngs=key)
    np.testing.assert_array_equal(sown["base_layer"]["y"][0], output)
    _, perturbations = nnx.capture(layer, nnx.Perturbation)(x, rngs=key)

    def loss(layer, perturbations):
        return nnx.capture(layer, nnx.Intermediate, init=perturbations)(x, rngs=key)[0].sum()

    gradient = nnx.grad(loss, argnums=1)(layer, perturbations)
    assert (gradient["base_layer"]["p"][...] == 1).all()


def test_embed_and_its_attend_share_one_rule(key):
    base = nnx.Embed(7, 4, rngs=rngs())
    layer, table = WeightDrop(base, RATE), layers.drop_weight(base.embedding[...], key, RATE)
    np.testing.assert_array_equal(layer(jnp.array([1, 3]), rngs=key), table[jnp.array([1, 3])])
    np.testing.assert_array_equal(
        layer.attend(jnp.ones((2, 4)), rngs=key), jnp.ones((2, 4)) @ table.T
    )


# Selection.


@pytest.mark.parametrize(
    "params, expected",
    [
        ("again/*", {"linear/kernel", "linear/bias"}),
        (lambda path, value: path[-1] == "bias", {"linear/bias", "norm/bias"}),
        (("*/scale", "*/kernel"), {"linear/kernel", "norm/scale"}),
        (nnx.Param, {"linear/kernel", "linear/bias", "norm/bias", "norm/scale"}),
        (nnx.PathContains("norm"), None),
    ],
)
def test_weights_are_selected_by_type_glob_predicate_or_several(params, expected, key):
    base = Block()
    if expected is None:
        expected = {"norm/bias", "norm/scale", "norm/mean", "norm/var"}
    dropped = drop_weights(base, key, RATE, params=params)
    before, after = (dict(nnx.to_flat_state(nnx.state(m))) for m in (base, dropped))
    changed = {"/".join(p) for p in before if after[p] is not before[p]}
    assert {name.replace("again", "linear") for name in changed} == expected


def test_selecting_nothing_lists_what_there_is():
    with pytest.raises(
        ValueError, match="params='kernels' selects nothing; there is: bias, kernel"
    ):
        WeightDrop(nnx.Linear(2, 2, rngs=rngs()), RATE, params="kernels")


def test_selecting_a_counter_names_it(key):
    with pytest.raises(TypeError, match="cannot drop weights of 'calls'.*floating or complex"):
        drop_weights(Block(), key, RATE, params="calls")


def test_a_selector_of_the_wrong_type_is_named(key):
    with pytest.raises(TypeError, match="params must be a type, a path glob.*got 3"):
        drop_weights(Block(), key, RATE, params=3)


def test_only_modules_can_be_wrapped():
    with pytest.raises(TypeError, match="base_layer must be an nnx.Module, got function"):
        WeightDrop(lambda x: x)


def test_masks_of_several_weights_do_not_depend_on_one_another(key):
    class Two(nnx.Module):
        def __init__(self, *names):
            for name in names:
                setattr(self, name, nnx.Param(jnp.ones((4, 4))))

    small, large = Two("a", "b"), Two("a", "b", "aa")
    np.testing.assert_array_equal(
        drop_weights(small, key, RATE).b[...], drop_weights(large, key, RATE).b[...]
    )


def test_weights_of_one_shape_have_masks_of_their_own(key):
    dropped = drop_weights(nnx.List([nnx.Linear(8, 8, rngs=rngs()) for _ in range(2)]), key, RATE)
    assert ((dropped[0].kernel[...] == 0) != (dropped[1].kernel[...] == 0)).any()


# Arguments that the wrapper and the base layer share.


def test_deterministic_reaches_a_base_layer_that_has_it(key):
    base = nnx.MultiHeadAttention(**ATTENTION, dropout_rate=0.5, rngs=rngs())
    layer, x = WeightDrop(base, RATE), jnp.ones((1, 3, 4))
    np.testing.assert_array_equal(layer(x, deterministic=True), base(x, deterministic=True))


def test_rngs_reach_a_base_layer_that_has_them_but_a_bare_key_does_not(key):
    class Taker(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(2, 2, rngs=rngs())

        def __call__(self, x, rngs=None):
            return rngs

    layer, streams = WeightDrop(Taker(), RATE), nnx.Rngs(0)
    assert layer(jnp.ones(2), rngs=streams) is streams
    assert layer(jnp.ones(2), rngs=key) is None


# Transforms.


def test_jax_transforms_may_close_over_it(key):
    layer, x = WeightDrop(nnx.Linear(4, 4, rngs=rngs()), RATE), jnp.ones(4)
    jacobians = [f(lambda x: layer(x, rngs=key))(x) for f in (jax.jacfwd, jax.jacrev)]
    np.testing.assert_allclose(*jacobians, rtol=1e-6)


def test_no_tracer_leaks(key):
    layer = WeightDrop(Block(), RATE, rngs=key)
    with jax.checking_leaks():
        nnx.jit(lambda m, x: nnx.grad(lambda m: m(x).sum())(m))(layer, jnp.ones((2, 4)))

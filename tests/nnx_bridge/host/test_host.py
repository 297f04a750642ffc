"""A Linen module hosted as a tree of NNX modules."""

from __future__ import annotations

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given

from nnx_bridge import Host, Node, unhost
from tests.helpers import assert_same_program, assert_trees_equal
from tests.strategies import linen_variables

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


class Net(nn.Module):
    """Statistics, dropout, and a second method."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dropout(0.5, deterministic=not train)(nn.relu(x))

    def predict(self, x: jax.Array) -> jax.Array:
        return self(x, train=False)


class Sows(nn.Module):
    """Equal names: a perturbation and an intermediate, a parameter and its average."""

    @nn.compact
    def __call__(self, x: jax.Array, record: bool = True) -> jax.Array:
        x = self.perturb("z", x)
        if record:
            self.sow("intermediates", "z", x)
        w = self.param("w", nn.initializers.ones, ())
        average = self.variable("ema", "w", lambda: 0.0 * w)
        if not self.is_initializing():
            average.value = 0.9 * average.value + 0.1 * w
        return x * w


def test_the_tree_mirrors_the_submodules() -> None:
    model = Host.init(Net(), KEYS, X)
    assert isinstance(model.Dense_0, Node)
    assert type(model.Dense_0.kernel) is nnx.Param
    assert type(model.BatchNorm_0.mean) is nnx.BatchStat


def test_parameters_are_those_of_linens_init() -> None:
    _, variables = unhost(Host.init(Net(), KEYS, X))
    assert_trees_equal(variables, Net().init(KEYS, X))


def test_the_keys_of_nnx_rngs_are_those_of_linens_init() -> None:
    _, variables = unhost(Host.init(nn.Dense(2), nnx.Rngs(7), X))
    key = nnx.Rngs(7)()
    assert_trees_equal(variables, nn.Dense(2).init(key, X))


def test_dropout_is_that_of_apply_with_the_same_keys() -> None:
    model = Host.init(Net(), KEYS, X)
    module, variables = unhost(model)
    expected, _ = module.apply(variables, X, rngs=KEYS, mutable=["batch_stats"])
    np.testing.assert_array_equal(model(X, rngs=KEYS), expected)


def test_the_streams_of_the_host_give_the_nth_call_the_nth_key() -> None:
    model = Host.init(Net(), KEYS, X)
    module, variables = unhost(model)
    for n in range(3):
        keys = {name: jax.random.fold_in(key, n) for name, key in KEYS.items()}
        expected, updates = module.apply(variables, X, rngs=keys, mutable=["batch_stats"])
        variables = {**variables, **updates}
        np.testing.assert_array_equal(model(X), expected)


def test_statistics_update_by_themselves() -> None:
    model = Host.init(Net(), KEYS, X)
    module, variables = unhost(model)
    _, updates = module.apply(variables, X, rngs=KEYS, mutable=["batch_stats"])
    model(X, rngs=KEYS)
    assert_trees_equal(unhost(model)[1], {**variables, **updates})


def test_a_call_can_forbid_updates() -> None:
    model = Host.init(Net(), KEYS, X)
    with pytest.raises(Exception, match='Cannot update variable "mean"'):
        model(X, rngs=KEYS, mutable=False)


def test_the_filter_of_the_host_holds_for_every_call() -> None:
    model = Host.init(Sows(), KEYS, X, mutable=["intermediates", "ema"])
    model(X)
    assert "intermediates" in unhost(model)[1]


def test_methods_are_called_as_on_the_module() -> None:
    model = Host.init(Net(), KEYS, X)
    module, variables = unhost(model)
    expected = module.apply(variables, X, method="predict")
    np.testing.assert_array_equal(model.predict(X), expected)
    np.testing.assert_array_equal(model(X, method="predict"), expected)


def test_fields_are_read_as_on_the_module() -> None:
    assert Host.init(nn.Dense(8, use_bias=False), KEYS, X).features == 8


def test_an_unknown_attribute_is_an_error_that_says_what_could_be_meant() -> None:
    model = Host.init(Net(), KEYS, X)
    with pytest.raises(AttributeError, match="hosted Net has no variable.* method 'encode'"):
        model.encode(X)


def test_equal_names_in_two_collections_stay_apart() -> None:
    model = Host.init(Sows(), KEYS, X)
    model(X, mutable=["intermediates", "ema"])
    variables = unhost(model)[1]
    np.testing.assert_array_equal(variables["intermediates"]["z"][0], X)
    np.testing.assert_array_equal(variables["perturbations"]["z"], 0 * X)
    assert (variables["params"]["w"], variables["ema"]["w"]) == (1.0, np.float32(0.1))


def test_sown_values_are_those_of_the_last_call_that_recorded() -> None:
    model = Host.init(Sows(), KEYS, X)
    for _ in range(3):
        model(X, mutable=["intermediates", "ema"])
    assert len(unhost(model)[1]["intermediates"]["z"]) == 1
    model(X, record=False, mutable=["intermediates", "ema"])
    assert "intermediates" not in unhost(model)[1]


def test_a_cache_that_a_call_creates_is_kept() -> None:
    attention = nn.MultiHeadDotProductAttention(num_heads=1, decode=True, qkv_features=3)
    variables = attention.init(KEYS, X[None])
    model = Host(attention, {"params": variables["params"]}, mutable=["cache"])
    model(X[None])
    model(X[None, :1])
    assert model.cache_index.get_value() == 1


def test_submodules_named_as_attributes_of_nnx_modules_are_kept() -> None:
    class Names(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for name in ("train", "rngs", "module", "_linen", "_linen_rngs", "_pytree__state"):
                x = nn.Dense(3, name=name)(x)
            return x

    model = Host.init(Names(), KEYS, X)
    module, variables = unhost(model)
    assert_trees_equal(variables, Names().init(KEYS, X))
    np.testing.assert_array_equal(model(X), module.apply(variables, X))


@given(linen_variables())
def test_any_variables_come_back_as_they_were(variables: dict[str, Any]) -> None:
    assert_trees_equal(unhost(Host(nn.Dense(3), variables))[1], variables)


def test_split_and_merge_keep_the_host() -> None:
    model = Host.init(Net(), KEYS, X)
    copy = nnx.merge(*nnx.split(model), copy=True)
    np.testing.assert_array_equal(copy(X), model(X))


def test_tabulate_counts_the_parameters() -> None:
    # Kernel, bias, scale and bias, the statistics, and key and count of two streams.
    assert "Total Parameters: 68" in nnx.tabulate(Host.init(Net(), KEYS, X), X)


def test_under_jit_updates_arrive_and_equal_modules_share_a_compilation() -> None:
    traced = []

    @nnx.jit
    def run(model: Host) -> jax.Array:
        traced.append(1)
        return model(X)

    model, other = Host.init(Net(), KEYS, X), Host.init(Net(), KEYS, X)
    y, z = run(model), run(other)
    np.testing.assert_array_equal(y, z)
    assert len(traced) == 1
    assert not np.array_equal(model.BatchNorm_0.mean.get_value(), np.zeros(8))


def test_no_tracer_leaks_from_a_compiled_gradient() -> None:
    model = Host.init(Net(), KEYS, X)
    with jax.checking_leaks():
        grads = nnx.jit(nnx.grad(lambda model: model(X).sum()))(model)
    assert grads.Dense_0.kernel.shape == (3, 8)


def test_initialisation_can_be_abstract() -> None:
    model = nnx.eval_shape(lambda: Host.init(Net(), KEYS, X))
    assert model.Dense_0.kernel.get_value() == jax.ShapeDtypeStruct((3, 8), jnp.float32)


def test_a_host_is_a_part_of_an_nnx_module() -> None:
    class Head(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.body = Host.init(Net(), rngs, X)
            self.head = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.head(self.body(x))

    model = Head(nnx.Rngs(0))
    assert nnx.jit(lambda model: model(X))(model).shape == (4, 2)
    assert model.body.BatchNorm_0.mean.get_value().any()


def test_variables_that_a_call_creates_come_out_of_jit() -> None:
    model = Host.init(Sows(), KEYS, X)
    nnx.jit(lambda model: model(X, mutable=["intermediates", "ema"]))(model)
    assert "intermediates" in unhost(model)[1]


def test_gradients_are_those_of_jax() -> None:
    model = Host.init(Net(), KEYS, X)
    module, variables = unhost(model)

    def loss(params: Any) -> jax.Array:
        y, _ = module.apply({**variables, "params": params}, X, rngs=KEYS, mutable=["batch_stats"])
        return jnp.sum(y**2)

    grads = nnx.grad(lambda model: jnp.sum(model(X, rngs=KEYS) ** 2))(model)
    expected = jax.grad(loss)(variables["params"])
    assert_trees_equal(nnx.to_pure_dict(grads), expected)


def test_a_boxed_model_trains_with_an_optimizer_without_a_mesh() -> None:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
    model = Host.init(nn.Dense(2, kernel_init=init), KEYS, X)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model: Host, optimizer: nnx.Optimizer) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(X) - 1.0) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert unhost(model)[1]["params"]["kernel"].names == ("data", "model")


def test_a_host_closed_over_by_jax_grad_may_run_what_writes_nothing() -> None:
    model = Host.init(Net(), {"params": KEYS["params"], "dropout": KEYS["dropout"]}, X)
    gradient = jax.grad(lambda x: model(x, train=False, rngs=KEYS).sum())(X)
    assert gradient.shape == X.shape


def test_a_module_that_cannot_be_hashed_is_hosted_and_compiled() -> None:
    class HasList(nn.Module):
        config: Any

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(self.config.width)(x)

    class Config:
        width = 2
        __hash__ = None  # type: ignore[assignment]

    model = Host.init(HasList(Config()), KEYS, X)
    assert nnx.jit(lambda model, x: model(x))(model, X).shape == (4, 2)


class Later(nn.Module):
    """Has parameters that its `setup` makes, which Linen runs when a method is called."""

    def setup(self) -> None:
        self.scale = self.param("scale", nn.initializers.normal(), ())

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale * x


class Helped(nn.Module):
    """Has a method that returns a submodule."""

    def make(self) -> nn.Module:
        return Later(name="later")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        later = self.make()
        return later(jnp.sin(x))


def test_watching_a_model_does_not_run_its_setup_earlier() -> None:
    assert_same_program(
        lambda x: unhost(Host.init(Helped(), KEYS["params"], x))[1],
        lambda x: Helped().init(KEYS["params"], x),
        X,
    )


class Axis(enum.Enum):
    """Keys that have no order, so that JAX cannot flatten a dict of them."""

    ROWS = 0
    COLUMNS = 1


class Keyed(nn.Module):
    """A dict with such keys in a field, in an argument and in a result."""

    widths: dict[Axis, int]

    @nn.compact
    def __call__(self, xs: dict[Axis, jax.Array]) -> dict[Axis, jax.Array]:
        return {axis: nn.Dense(width)(xs[axis]) for axis, width in self.widths.items()}


class OfKeyed(nn.Module):
    """Passes such a dict to its submodule."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        keyed = Keyed({Axis.ROWS: 2, Axis.COLUMNS: 2}, name="keyed")
        return sum(keyed({Axis.ROWS: x, Axis.COLUMNS: 2 * x}).values())


def test_keys_of_dicts_need_no_order() -> None:
    model = Host.init(OfKeyed(), KEYS, X)
    assert set(model.keyed.widths) == set(Axis)
    assert_trees_equal(model(X), OfKeyed().apply(unhost(model)[1], X))
    first = model.keyed({Axis.ROWS: X, Axis.COLUMNS: X})[Axis.ROWS]
    assert_trees_equal(first, model.keyed.Dense_0(X))


def test_a_class_instead_of_a_module_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"got the class Dense; write Dense\(\.\.\.\)"):
        Host(nn.Dense, {})  # type: ignore[arg-type]


def test_an_nnx_module_is_an_error() -> None:
    with pytest.raises(TypeError, match="got Linear, which is an NNX module"):
        Host(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {})  # type: ignore[arg-type]

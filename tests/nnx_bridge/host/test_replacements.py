"""NNX modules in the places of Linen submodules: the hosted parent calls them; and the way back."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import lifted
import nnx_bridge
from nnx_bridge import Host
from tests.helpers import assert_trees_close, assert_trees_equal, normal, strict, total
from tests.nnx_bridge.host.models import KEYS, Around, Block, Carries, Net, Scanned, X


def hosted(module: nn.Module | None = None) -> Host:
    return Host.init(module or Net(), KEYS, X)


def migrated() -> Host:
    model = hosted()
    model.layers_0 = Block(nnx.Rngs(3))
    return model


def stacked() -> nnx.Module:
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return Carries(rngs)

    return make(nnx.Rngs(0))


def test_the_parent_calls_the_replacement() -> None:
    model, plain = hosted(), hosted()
    model.layers_1 = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    model.layers_1.kernel[...] = plain.layers_1.kernel[...]
    with strict():
        assert_trees_equal(model(X), plain(X))
    model.layers_1.kernel[...] = 0 * plain.layers_1.kernel[...]
    assert not jnp.array_equal(model(X), plain(X))


def test_statistics_and_streams_of_the_replacement_move() -> None:
    model, alone = migrated(), Block(nnx.Rngs(3))
    hidden = model.encode(X)
    first, second = model(X), model(X)
    alone(hidden)
    alone(hidden)
    assert not jnp.array_equal(first, second)
    assert_trees_equal(nnx.state(model.layers_0), nnx.state(alone))


@pytest.mark.parametrize("make", [Net, Scanned])
def test_a_wrapper_around_the_original_node_changes_no_bit(make: Callable[[], Any]) -> None:
    model, plain = hosted(make()), hosted(make())
    where = "encoder" if make is Net else "layers"
    wrapped = Around(getattr(model, where))
    if make is Scanned:
        wrapped.scale.set_value(jnp.ones(3))  # One for each layer of the scan.
    setattr(model, where, wrapped)
    model.train()
    plain.train()
    for _ in range(2):
        assert_trees_equal(model(X), plain(X))
    inner = nnx.state(getattr(model, where).inner)
    assert_trees_equal(inner, nnx.state(getattr(plain, where)))


def test_linens_scan_slices_the_replacement() -> None:
    model = hosted(Scanned())
    model.layers = stacked()
    with strict():
        model(X)
    assert model.layers.norm.mean.get_value().shape == (3, 4)
    assert all(model.layers.norm.mean.get_value().any(axis=1))
    grads = nnx.grad(lambda model: (model(X) ** 2).sum())(model)
    assert grads["layers"]["dense"]["kernel"].get_value().shape == (3, 4, 4)


class Cell(nnx.Module):
    """A native cell, of which `nn.RNN` calls nothing but `__call__`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.i, self.h = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 3, use_bias=False, rngs=rngs)

    def __call__(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = jnp.tanh(self.i(x) + self.h(carry))
        return carry, carry


def test_the_cell_of_an_rnn() -> None:
    x = normal(2, 3, 4)
    model = Host.init(nn.RNN(nn.SimpleCell(3)), KEYS, x)
    before, old = model(x), model.cell
    model.cell = Cell(nnx.Rngs(0))
    nnx.update(model.cell, nnx.state(old))
    assert_trees_close(model(x), before)


def remembers_its_fields(kind: Any) -> Any:
    """A class decorator that wraps the constructor, as libraries do that save configurations."""
    init = kind.__init__

    def wrapped(self: Any, *args: Any, **fields: Any) -> None:
        init(self, *args, **fields)
        object.__setattr__(self, "config", dict(fields))

    kind.__init__ = wrapped
    return kind


@remembers_its_fields
class Configured(nn.Module):
    """Reads its fields from what its constructor has kept."""

    width: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.config["width"], name="out")(x)


def test_the_way_back_keeps_a_constructor_that_was_wrapped() -> None:
    model = hosted(Configured(width=2))
    model.out = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    module, variables = nnx_bridge.unhost(model)
    assert_trees_equal(module.apply(variables, X), model(X))


def test_gradients_are_those_of_the_native_module() -> None:
    model = migrated()
    model.layers_0.eval()
    hidden = model.encode(X)

    def tail(block: Any) -> jax.Array:
        y = model.layers_1(block(hidden))
        return jnp.sum(model.norm(model.named_a(y), use_running_average=True) ** 2)

    grads = nnx.grad(lambda model: jnp.sum(model(X) ** 2))(model)
    assert_trees_close(grads["layers_0"], nnx.grad(tail)(model.layers_0))


def test_transforms_take_a_migrated_model() -> None:
    model = migrated()
    model.encoder = Around(model.encoder)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model: Host, optimizer: nnx.Optimizer) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(X, True) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    before = model.layers_0.dense.kernel.get_value()
    with strict():
        losses = [step(model, optimizer) for _ in range(2)]
        grads, _ = lifted.grad(total, model, X, grad_variables="params")
    assert losses[0] != losses[1]
    assert not jnp.array_equal(model.layers_0.dense.kernel.get_value(), before)
    assert grads["encoder"]["scale"].get_value() != 0
    assert_trees_equal(nnx.merge(*nnx.split(model), copy=True)(X), model(X))


def test_what_a_replacement_sows_lands_in_the_capture() -> None:
    class Sows(nnx.Module):
        def __init__(self) -> None:
            self.inner = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow(nnx.Intermediate, "x", x)
            return self.perturb("y", self.inner(x))

    model = hosted()
    model.layers_0 = Sows()
    call = nnx_bridge.capture(model, nnx.Intermediate, nnx.Perturbation)
    _, sown, zeros = call(X)
    assert_trees_equal(sown["layers_0"]["x"].get_value()[0], model.encode(X))
    assert zeros["layers_0"]["y"].get_value().shape == (2, 4)
    result = nnx_bridge.capture_grad(total, model, X)
    assert result.intermediate_grads["layers_0"]["y"].get_value().any()


def test_one_native_module_in_two_places() -> None:
    model = hosted()
    model.layers_0 = model.layers_1 = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    grads = nnx.grad(lambda model: model(X).sum())(model)
    assert set(grads) == {"embed", "encoder", "layers_0", "named_a", "norm"}


def test_a_node_that_was_given_a_module_calls_its_replacement() -> None:
    model = hosted()
    model.embed = Around(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    encode = lambda module, x: module.encoder(x)  # noqa: E731
    assert_trees_equal(model.encoder(X), model(X, method=encode))


def test_a_parent_reads_a_parameter_of_the_replacement() -> None:
    class Tied(nn.Module):
        def setup(self) -> None:
            self.embed = nn.Embed(7, 4)

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return self.embed(tokens) @ self.embed.embedding.T

    tokens = jnp.array([1, 2])
    model = Host.init(Tied(), KEYS, tokens)
    model.embed = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
    expected = model.embed(tokens) @ model.embed.embedding[...].T
    assert_trees_equal(model(tokens), expected)
    module, variables = nnx_bridge.unhost(model)
    assert_trees_equal(module.init(KEYS, tokens), variables)


def test_another_host_as_replacement() -> None:
    model, other = hosted(), Host.init(nn.Dense(4), KEYS, X)
    model.layers_0 = other
    hidden = model.encode(X)
    y = model.norm(model.named_a(model.layers_1(other(hidden))), use_running_average=True)
    assert_trees_equal(model(X), y)


def test_a_replacement_of_another_shape_leaves_the_model() -> None:
    model = hosted()
    model.layers_0 = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    before = nnx_bridge.unhost(model)[1]
    with pytest.raises(
        ValueError,
        match=r"layers_0, replaced by Linear: __call__\(float32\[2,4\]\) must return \(2, 4\), as "
        r"the Linen module does, but returned \(2, 5\)",
    ):
        model(X)
    assert_trees_equal(nnx_bridge.unhost(model)[1], before)


def test_a_replacement_with_another_signature() -> None:
    class NoFlag(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    model = hosted()
    model.encoder = NoFlag()
    with pytest.raises(
        TypeError,
        match=r"encoder, replaced by NoFlag: the model calls __call__\(float32\[2,4\], bool\[\]\), "
        r"but NoFlag.__call__ takes \(x: .*: too many positional",
    ):
        model(X)


def test_a_replacement_that_is_none() -> None:
    model = hosted()
    with pytest.raises(AttributeError, match="no submodule 'layer_0' .* did you mean 'layers_0'"):
        model.layer_0 = Block(nnx.Rngs(0))
    with pytest.raises(TypeError, match="layers_0: the model calls its method '__call__', which"):
        model.layers_0 = nnx.Module()


def test_new_state_in_a_call_is_an_error() -> None:
    class Grows(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            self.seen = nnx.BatchStat(x.mean())
            return x

    model = hosted()
    model.layers_0 = Grows()
    with pytest.raises(ValueError, match="layers_0, replaced by Grows: .* new state, seen, which"):
        model(X)


def test_a_collection_that_linens_transform_does_not_carry() -> None:
    class Other(nnx.Variable[Any]):
        pass

    class Holds(nnx.Module):
        def __init__(self) -> None:
            self.other = Other(jnp.ones((3, 4)))

        def __call__(self, x: jax.Array, *_: Any) -> Any:
            return x * self.other[...], None

    model = hosted(Scanned())
    model.layers = Holds()
    with pytest.raises(ValueError, match=r"variable Other/layers/other is not there.*variable_axe"):
        model(X)


def test_without_replacements_the_way_back_is_the_identity() -> None:
    module = Net()
    variables = module.init(KEYS, X)
    back, same = nnx_bridge.unhost(Host(module, variables))
    assert back is module
    assert_trees_equal(same, variables)


def test_a_migrated_model_is_a_linen_module_again() -> None:
    model = migrated()
    model.encoder = Around(model.encoder)
    module, variables = nnx_bridge.unhost(model)
    assert isinstance(module, Net) and type(module).__name__ == "Net"
    mutable = [name for name in variables if name != "params"]
    expected, updates = module.apply(variables, X, True, rngs=KEYS, mutable=mutable)
    assert_trees_equal(model(X, True, rngs=KEYS), expected)
    assert_trees_equal(nnx_bridge.unhost(model)[1], {**variables, **updates})
    hosted_again = Host(module, variables)
    assert_trees_equal(hosted_again(X, True, rngs=KEYS), expected)


class Scale(nn.Module):
    def setup(self) -> None:
        self.by = self.param("by", nn.initializers.ones, (4,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.by


class Codec(nn.Module):
    """Several methods, and a submodule whose `setup` makes a parameter."""

    def setup(self) -> None:
        self.scale = Scale()
        self.decoder = nn.Dense(4)

    def decode(self, x: jax.Array) -> jax.Array:
        return self.decoder(x)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decode(self.scale(x))


class Negative(nnx.Module):
    def __init__(self) -> None:
        self.sign = nnx.Param(jnp.float32(-1))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.sign


@pytest.mark.parametrize(
    "method",
    ["decode", "decoder", Codec.decode, Codec().decode]
    + [lambda model, x: model.decode(x), lambda model, x: model.decoder(x)],
)
def test_every_way_into_a_migrated_model_finds_the_replacements(method: Any) -> None:
    model = hosted(Codec())
    model.decoder = Negative()
    module, variables = nnx_bridge.unhost(model)
    assert_trees_equal(module.apply(variables, X, method=method), -X)
    made = module.init(KEYS, X, method=method)
    assert_trees_equal(made["params"]["decoder"], variables["params"]["decoder"])


def test_initialisation_makes_nothing_for_what_is_replaced() -> None:
    model = hosted(Codec())
    model.scale, model.decoder = Negative(), Negative()
    module, variables = nnx_bridge.unhost(model)
    assert_trees_equal(module.init(KEYS, X), variables)


def test_a_migrated_model_initialises_inside_of_a_linen_model() -> None:
    module, variables = nnx_bridge.unhost(migrated())

    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3)(self.inner(x))

    made = Outer(module).init(KEYS, X)
    assert_trees_equal(made["params"]["inner"]["layers_0"], variables["params"]["layers_0"])
    assert jax.tree.structure(made["params"]["inner"]) == jax.tree.structure(variables["params"])
    mutable = [name for name in made if name != "params"]
    y, _ = Outer(module).apply(made, X, mutable=mutable)
    assert y.shape == (2, 3)


def linears(axis: int | None) -> nnx.Module:
    """A linear layer, or three of them stacked at an axis."""
    make = lambda rngs: nnx.Linear(4, 4, rngs=rngs)  # noqa: E731
    if axis is None:
        return make(nnx.Rngs(0))
    return nnx.split_rngs(splits=3)(nnx.vmap(make, out_axes=axis))(nnx.Rngs(0))


class Lifted(nn.Module):
    """A layer in a block below a transform of Linen."""

    transform: str
    axis: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stacks = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        of = {
            "remat": lambda: nn.remat(Inner),
            "jit": lambda: nn.jit(Inner),
            "map_variables": lambda: nn.map_variables(Inner, "params", _twice, _half, init=True),
            "vmap": lambda: nn.vmap(nn.remat(Inner), **stacks, in_axes=None, axis_size=3),
            "scan": lambda: nn.scan(nn.jit(Inner), **stacks, length=3),
        }
        return of[self.transform]()(name="inner")(x)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        x = nn.Dense(4, name="first")(x)
        return nn.Dense(4, name="second")(x), None


def _twice(variables: Any) -> Any:
    return jax.tree.map(lambda x: 2 * x, variables)


def _half(variables: Any) -> Any:
    return jax.tree.map(lambda x: x / 2, variables)


@pytest.mark.parametrize(
    ("transform", "axis"),
    [("remat", None), ("jit", None), ("map_variables", None)]
    + [(name, axis) for name in ("vmap", "scan") for axis in (0, 1, -1)],
)
def test_linens_transforms_initialise_around_a_replacement(transform: str, axis: Any) -> None:
    module = Lifted(transform, axis or 0)
    model = hosted(module)
    model.inner.second = linears(axis)
    module, variables = nnx_bridge.unhost(model)
    with strict():
        y, made = module.init_with_output(KEYS, X)
    assert_trees_equal(made["params"]["inner"]["second"], variables["params"]["inner"]["second"])
    assert_trees_equal(made["params"]["inner"]["first"], variables["params"]["inner"]["first"])
    if transform != "map_variables":  # Its own `init` runs on what is mapped twice.
        assert_trees_close(y, module.apply(made, X))


def test_initialisation_leaves_statistics_and_streams_as_they_are() -> None:
    model = hosted(Scanned())
    model.layers = stacked()
    module, variables = nnx_bridge.unhost(model)
    assert_trees_equal(module.init(KEYS, X), variables)


def test_initialisation_below_a_transform_of_the_model_around() -> None:
    module, variables = nnx_bridge.unhost(migrated())

    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            axes = {"params": 1, "batch_stats": 0, "RngKey": 0, "RngCount": 0}
            call = lambda self, x, _: (self.inner(x), None)  # noqa: E731
            split = {"params": True, "dropout": True}
            return nn.scan(call, variable_axes=axes, split_rngs=split, length=3)(self, x, None)[0]

    made = Outer(module).init(KEYS, X)
    kernel = variables["params"]["layers_0"]["dense"]["kernel"]
    expected = jnp.stack([kernel] * 3, axis=1)
    assert_trees_equal(made["params"]["inner"]["layers_0"]["dense"]["kernel"], expected)


@pytest.mark.parametrize("axis", [None, 1])
def test_a_replacement_that_is_not_stacked_as_the_transform_wants(axis: int | None) -> None:
    model = hosted(Lifted("scan"))
    model.inner.second = linears(axis)
    note = "inner/second, replaced by Linear, is inside of .* stack its .* they are bias .*, kernel"
    module, variables = nnx_bridge.unhost(model)
    for call in (lambda: model(X), lambda: module.init(KEYS, X)):
        with pytest.raises((TypeError, ValueError), match="size|shape|return") as info:
            call()
        assert re.search(note, "".join(info.value.__notes__))


class Helped(nn.Module):
    """Calls a method of its own."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scaled(nn.Dense(4)(x))

    def scaled(self, x: jax.Array) -> jax.Array:
        return 2 * x


def test_methods_that_a_module_calls_on_itself_are_not_asked_of_its_replacement() -> None:
    model = hosted(nn.Sequential([Helped()]))
    model.layers_0 = native = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    assert_trees_equal(model(X), native(X))


class OfTheCall(nn.Module):
    """Makes its submodules with fields that depend on the arguments of the call."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        size = x.std()
        x = nn.Dense(4, bias_init=lambda key, shape, _: jnp.full(shape, size), name="dense")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dropout(0.5, deterministic=not train, name="drop")(x)


def test_what_a_replacement_holds_has_the_fields_of_the_running_call() -> None:
    module, rngs = OfTheCall(), {"dropout": jax.random.key(2)}
    variables = module.init(KEYS, X)
    model = Host(module, variables, jax.eval_shape(lambda: X))
    for name in ("dense", "norm", "drop"):
        model[name] = Around(model[name])
    wanted, updates = module.apply(variables, X, True, rngs=rngs, mutable=["batch_stats"])
    migrated, held = nnx_bridge.unhost(model)
    found, found_updates = migrated.apply(held, X, True, rngs=rngs, mutable=["batch_stats"])
    assert_trees_equal(found, wanted)
    assert_trees_equal(model(X, True, rngs=rngs), wanted)
    statistics = updates["batch_stats"]["norm"]
    assert_trees_equal(found_updates["batch_stats"]["norm"]["inner"], statistics)
    assert_trees_equal(nnx_bridge.unhost(model)[1]["batch_stats"]["norm"]["inner"], statistics)


def test_what_a_replacement_holds_of_another_model_keeps_its_own_fields() -> None:
    model, other = hosted(nn.Sequential([nn.Dense(4)])), hosted(nn.Sequential([nn.Dense(4, False)]))
    model.layers_0 = Around(other.layers_0)
    assert_trees_equal(model(X), other(X))


class Given(nn.Module):
    inner: nn.Module

    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu(self.inner(x))


class Gives(nn.Module):
    def setup(self) -> None:
        self.shared = nn.Dense(4)
        self.user = Given(self.shared)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.user(self.shared(x))


def test_a_replacement_calls_the_replacement_of_a_module_that_it_was_given() -> None:
    model = hosted(Gives())
    wanted = model(X)
    model.shared, model.user = Around(model.shared), Around(model.user)
    assert_trees_equal(model(X), wanted)
    module, variables = nnx_bridge.unhost(model)
    assert_trees_equal(module.apply(variables, X), wanted)


def test_two_nodes_in_each_others_places() -> None:
    model = hosted()
    variables = nnx_bridge.unhost(model)[1]
    params = variables["params"]
    swapped = {**params, "layers_0": params["layers_1"], "layers_1": params["layers_0"]}
    model.layers_0, model.layers_1 = model.layers_1, model.layers_0
    wanted = Net().apply({**variables, "params": swapped}, X)
    assert_trees_equal(model(X), wanted)
    module, held = nnx_bridge.unhost(model)
    assert_trees_equal(module.apply(held, X), wanted)


class Adds(nn.Module):
    """Has its parameters beside those of the module that it holds."""

    base: nn.Module

    def setup(self) -> None:
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.base(x) + self.param("more", nn.initializers.normal(), (4,))


def test_a_wrapper_around_a_module_that_shares_its_scope() -> None:
    model = hosted(nn.Sequential([Adds(nn.Dense(4))]))
    wanted = model(X)
    assert_trees_equal(model.layers_0(X), wanted)
    model.layers_0 = Around(model.layers_0)
    assert_trees_equal(model(X), wanted)

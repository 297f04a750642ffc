"""What can be lifted, and what comes out: classes, functions, methods; odd modules."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import lifted
import nnx_bridge as nn
from tests.helpers import assert_trees_close, assert_trees_equal, normal, strict
from tests.nnx_bridge import models
from tests.nnx_bridge.transforms.twins import LinenBlock, NNXBlock, collections

X = normal(4, 3)
ALL_SPLIT = {True: True}


def call(mdl: Any, *args: Any) -> Any:
    return mdl(*args)


WHOLE = ("remat", "jit", "map_variables", "named_call")


@pytest.mark.parametrize("transform", WHOLE)
@pytest.mark.parametrize("model", models.MODELS)
def test_a_function_does_what_it_does_plainly(transform: str, model: str) -> None:
    mdl = models.make(models.MODELS[model])
    plain = nnx.clone(mdl)
    options = {"mutable": True} if transform == "map_variables" else {}
    with strict():
        y = getattr(nn, transform)(call, **options)(mdl, X)
    assert_trees_close(y, plain(X))
    assert_trees_close(nnx.state(mdl), nnx.state(plain))


@pytest.mark.parametrize("model", ["norm", "noisy", "counter", "shared", "containers"])
def test_a_loop_of_one_step_does_what_a_plain_call_does(model: str) -> None:
    mdl = models.make(models.MODELS[model])
    plain = nnx.clone(mdl)
    carried = nnx.Not(nnx.Param)
    run = nn.scan(
        lambda mdl, carry, x: (carry, mdl(x)),
        variable_broadcast="params",
        variable_carry=carried,
        split_rngs={True: False},
    )
    with strict():
        _, y = run(mdl, 0.0, X[None])
    assert_trees_close(y[0], plain(X))
    assert_trees_close(nnx.state(mdl), nnx.state(plain))


def test_a_class_is_a_class_with_linens_name() -> None:
    for transform, options in (
        ("vmap", {"variable_axes": {"params": 0}, "axis_size": 2}),
        ("remat", {}),
        ("jit", {}),
        ("scan", {"length": 2}),
        ("map_variables", {}),
        ("remat_scan", {"lengths": (2,)}),
        ("fold_rngs", {}),
        ("add_metadata_axis", {}),
    ):
        lifted_class = getattr(nn, transform)(nnx.Linear, **options)
        wanted = getattr(linen, transform)(linen.Dense, **options).__name__
        assert issubclass(lifted_class, nnx.Linear)
        if transform != "add_metadata_axis":  # Linen's is made of map_variables.
            assert lifted_class.__name__ == wanted.replace("Dense", "Linear")


def test_a_partial_of_a_class() -> None:
    partial = functools.partial(nnx.Linear, 3, 2, use_bias=False)
    made = nn.vmap(partial, variable_axes={"params": 0}, split_rngs=ALL_SPLIT, axis_size=4)
    assert made(rngs=nnx.Rngs(0)).kernel.shape == (4, 3, 2)


class Codec(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 3, rngs=rngs)

    def encode(self, x: jax.Array) -> jax.Array:
        return self.dense(x)

    def decode(self, x: jax.Array) -> jax.Array:
        return self.encode(x) @ self.dense.kernel[...].T


def test_a_class_that_asks_for_its_index_where_it_makes_its_variables() -> None:
    class Indexed(nnx.Module):
        def __init__(self) -> None:
            self.index = nnx.Param(jax.lax.axis_index("i"))

        def __call__(self) -> None:
            pass

    mdl = nn.vmap(Indexed, variable_axes={"params": 0}, axis_size=3, axis_name="i")()
    assert mdl.index[...].tolist() == [0, 1, 2]


def test_methods_that_call_each_other_are_lifted_once() -> None:
    options = {"variable_axes": {"params": 0}, "split_rngs": ALL_SPLIT, "axis_size": 4}
    codec = nn.vmap(Codec, methods=["encode", "decode"], **options)(nnx.Rngs(0))
    one = nnx.vmap(Codec.decode)
    plain = nnx.split_rngs(splits=4)(nnx.vmap(Codec))(nnx.Rngs(0))
    nnx.update(plain, nnx.state(codec))
    assert_trees_close(codec.decode(X), one(plain, X))


def test_methods_with_options_of_their_own() -> None:
    shared = {"variable_axes": {"params": 0}, "split_rngs": ALL_SPLIT, "axis_size": 4}
    # The size of an axis is known where an argument has it; once is enough.
    first = {name: value for name, value in shared.items() if name != "axis_size"}
    methods = {"encode": first, "decode": {**shared, "in_axes": None}}
    codec = nn.vmap(Codec, methods=methods)(nnx.Rngs(0))
    assert codec.encode(X).shape == (4, 3)
    assert codec.decode(X).shape == (4, 4, 3)


def test_a_method_inside_of_a_class() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.block = NNXBlock(rngs)

        @nn.jit
        @nn.remat
        def __call__(self, x: jax.Array) -> Any:
            return self.block(x)

    mdl = Model(nnx.Rngs(0))
    plain = nnx.clone(mdl.block)
    assert_trees_close(mdl(X), plain(X))
    assert_trees_close(nnx.state(mdl.block), nnx.state(plain))


def test_static_arguments() -> None:
    def maybe(mdl: Any, x: jax.Array, double: bool) -> jax.Array:
        return 2 * mdl(x) if double else mdl(x)

    mdl = models.make(models.MLP)
    for transform in (nn.remat, nn.jit):
        run = transform(maybe, static_argnums=(2,))
        assert_trees_close(run(mdl, X, True), 2 * mdl(X))
    assert_trees_close(nn.jit(maybe, static_argnames="double")(mdl, X, double=False), mdl(X))


def test_keyword_arguments_have_their_axes() -> None:
    run = nn.vmap(lambda mdl, x, y: mdl(x) + y, variable_axes={"params": None}, in_axes=(0, None))
    mdl = models.make(models.MLP)
    assert_trees_close(run(mdl, X, y=1.0), run(mdl, X, 1.0))


def test_several_modules_and_modules_among_the_arguments() -> None:
    first, second = models.make(models.Norm, 0), models.make(models.Norm, 1)
    plain = nnx.clone(first), nnx.clone(second)

    def together(first: Any, x: jax.Array, second: Any) -> Any:
        return second(first(x)[..., :1].repeat(3, -1))

    def of_pair(pair: Any, x: jax.Array) -> Any:
        return together(pair[0], x, pair[1])

    wanted = together(plain[0], X, plain[1])
    y = nn.remat(together)(first, X, second)
    assert_trees_close(y, wanted)
    assert_trees_close(nnx.state((first, second)), nnx.state(plain))
    assert_trees_close(nn.remat(of_pair)((first, second), X), together(plain[0], X, plain[1]))


def test_a_shared_module_is_lifted_once() -> None:
    mdl = models.make(models.Shared)
    stacked = nnx.split_rngs(splits=2)(nnx.vmap(models.Shared))(nnx.Rngs(0))
    assert stacked.tied.kernel is stacked.first.kernel
    x, _ = nn.scan(
        lambda mdl, x: (mdl(x), None), variable_axes={"params": 0}, split_rngs=ALL_SPLIT
    )(stacked, X)
    assert x.shape == mdl(X).shape
    assert stacked.tied.kernel is stacked.first.kernel


@pytest.mark.parametrize("transform", ["vmap", "scan", "remat", "jit", "cond"])
def test_a_hosted_model(transform: str) -> None:
    module = LinenBlock()
    variables = module.init(jax.random.key(0), X)
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    native = NNXBlock(nnx.Rngs(0))
    nnx.update(native, nn.to_state(variables))
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 3), variables["batch_stats"])
    if transform == "vmap":
        nnx.update(native, nn.to_state({"batch_stats": stacked}))
        variables = {**variables, "batch_stats": stacked}
        run = nn.vmap(call, {"params": None, "batch_stats": 0}, in_axes=None)
    elif transform == "scan":
        run = nn.scan(call, variable_broadcast="params", variable_carry="batch_stats", length=3)
    elif transform == "cond":
        run = functools.partial(nn.cond, True, call, call)
    else:
        run = getattr(nn, transform)(call)
    hosted = nn.Host(module, variables)
    assert_trees_close(run(hosted, X), run(native, X))
    assert_trees_close(collections(hosted), collections(native))


def test_in_tree_mode_and_under_other_transforms() -> None:
    blocks = nn.scan(
        NNXBlock, {"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2
    )
    mdl, plain = blocks(nnx.Rngs(0)), blocks(nnx.Rngs(0))
    wanted = plain(X)
    y = nnx.jit(lambda mdl, x: mdl(x))(mdl, X)
    assert_trees_close(y, wanted)
    assert_trees_close(nnx.state(mdl), nnx.state(plain))
    graphdef, state = nnx.split(blocks(nnx.Rngs(0)), graph=False)
    assert_trees_close(nnx.merge(graphdef, state)(X), wanted)


def test_perturbations_of_scanned_layers() -> None:
    class Perturbed(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.dense = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> Any:
            return self.perturb("z", jnp.tanh(self.dense(x))), None

    axes = {"params": 0, "perturbations": 0}
    mdl = nn.scan(Perturbed, axes, split_rngs={"params": True}, length=3)(nnx.Rngs(0))
    captured = nn.capture(mdl, nnx.Perturbation)
    (y, _), zeros = captured(X)
    assert zeros["z"].shape == (3, 4, 3)

    def loss(perturbations: Any) -> jax.Array:
        (y, _), _ = nn.capture(mdl, nnx.Perturbation, init=perturbations)(X)
        return y.sum()

    gradient = jax.grad(loss)(zeros)
    assert_trees_close(gradient["z"].get_value()[-1], jnp.ones_like(y))


def test_what_is_recorded_without_a_rule_is_dropped() -> None:
    blocks = nn.scan(
        NNXBlock, {"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2
    )
    _, recorded = nn.capture(blocks(nnx.Rngs(0)), nnx.Intermediate)(X)
    assert not recorded


class Sowing(nnx.Module):
    """Sows whether something captures or not, as code of Linen does."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> Any:
        y = self.dense(x)
        self.sow(nnx.Intermediate, "y", y)
        return y, None


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("axes", [{"params": 0}, {"params": 0, "intermediates": 0}])
def test_what_is_sown_outside_of_a_capture(axes: Any) -> None:
    blocks = nn.scan(Sowing, axes, split_rngs={"params": True}, length=2)(nnx.Rngs(0))
    for times in range(3):
        recorded = nnx.state(blocks, nnx.Intermediate)
        values = recorded["y"].get_value() if recorded else ()
        assert [y.shape for y in values] == [(2, 4, 3)] * times * ("intermediates" in axes)
        blocks(X)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_was_sown_before_a_loop_stays() -> None:
    mdl = Sowing(nnx.Rngs(0))
    mdl(X)
    nn.scan(lambda mdl, x: mdl(x), variable_broadcast="params", length=2)(mdl, X)
    run = nn.vmap(lambda mdl, x: mdl(x)[0], {"params": None, "intermediates": 0})
    run(mdl, X[None])
    assert [y.shape for y in mdl.y.get_value()] == [(4, 3), (1, 4, 3)]


def test_what_is_recorded_twice_is_there_twice() -> None:
    axes = {"params": 0, "batch_stats": 0, "intermediates": 0}
    blocks = nn.scan(NNXBlock, axes, split_rngs={"params": True}, length=2)

    def twice(mdl: Any, x: jax.Array) -> Any:
        return mdl(mdl(x)[0])

    _, recorded = nn.capture(twice, nnx.Intermediate)(blocks(nnx.Rngs(0)), X)
    assert [h.shape for h in recorded["h"].get_value()] == [(2, 4, 3)] * 2


@pytest.mark.parametrize("transform", ["grad", "jacfwd", "jacrev"])
def test_derivatives_of_scanned_layers(transform: str) -> None:
    """google/flax #4771: a derivative with respect to the input, with Dropout in the layers."""
    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}

    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.dense = nnx.Linear(3, 3, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array, _: Any = None) -> Any:
            return self.drop(jnp.tanh(self.dense(x))), None

    mdl = nn.scan(Layer, **options)(nnx.Rngs(0))

    def out(mdl: Any, x: jax.Array) -> jax.Array:
        y = mdl(x)[0]
        return y.sum() if transform == "grad" else y

    x = normal(3)
    graphdef, state = nnx.split(nnx.clone(mdl))
    by_jax = getattr(jax, transform)(lambda x: out(nnx.merge(graphdef, state, copy=True), x))(x)
    (derivative,) = getattr(lifted, transform)(out, mdl, x)
    assert_trees_close(derivative, by_jax)
    assert_trees_equal(mdl.drop.rngs.count[...], jnp.array([1, 1], jnp.uint32))


@pytest.mark.parametrize("length", [0, 1])
def test_loops_of_no_step_and_of_one(length: int) -> None:
    axes = {"params": 0, "batch_stats": 0}
    mdl = nn.scan(NNXBlock, axes, split_rngs={"params": True}, length=length)(nnx.Rngs(0))
    assert mdl.dense.kernel.shape == (length, 3, 3)
    plain = nnx.clone(mdl)
    x, sums = mdl(X)
    if length == 0:
        assert_trees_equal(x, X)
        assert_trees_equal(nnx.state(mdl), nnx.state(plain))
    else:
        one = NNXBlock(nnx.Rngs(0))
        nnx.update(one, jax.tree.map(lambda x: x[0], nnx.state(plain, nnx.Not(nnx.RngState))))
        assert_trees_close(x, one(X)[0])
    assert sums.shape == (length,)


def test_stacked_layers_of_a_host() -> None:
    axes = {"params": 0, "batch_stats": 0, "intermediates": 0}
    module = linen.scan(LinenBlock, axes, split_rngs={"params": True}, length=3)()
    variables = module.init(jax.random.key(0), X)
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    hosted = nn.Host(LinenBlock(), variables)
    wanted, updates = module.apply(variables, X, mutable=["batch_stats", "intermediates"])
    y, recorded = nn.capture(nn.scan(call, axes), nnx.Intermediate)(hosted, X)
    assert_trees_close(y, wanted)
    assert_trees_close(collections(hosted)["batch_stats"], updates["batch_stats"])
    assert_trees_close(nn.to_variables(recorded)["intermediates"], updates["intermediates"])


class Memory(nnx.Module):
    def __init__(self) -> None:
        self.now = nnx.BatchStat(jnp.array(0.0))
        self.before = nnx.BatchStat(jnp.array(-1.0))
        self.each = nnx.Cache(jnp.zeros(3))
        self.offset = nnx.Param(jnp.array(7.0))


def test_values_that_go_from_one_variable_to_another_in_a_loop() -> None:
    def step(mdl: Memory, carry: Any) -> Any:
        mdl.before.set_value(mdl.now[...])
        mdl.each.set_value(mdl.offset[...])
        mdl.now.set_value(mdl.now[...] + 1)
        return carry, None

    mdl = Memory()
    run = nn.scan(step, {"cache": 0}, variable_broadcast="params", variable_carry="batch_stats")
    run(mdl, 0.0)
    assert (float(mdl.now[...]), float(mdl.before[...])) == (3.0, 2.0)
    assert_trees_equal(mdl.each[...], jnp.full(3, 7.0))


def test_values_that_go_from_one_variable_to_another_in_a_branch() -> None:
    def copy(mdl: Memory) -> None:
        mdl.before.set_value(mdl.now[...])

    for pred in (True, False):
        mdl = Memory()
        nn.cond(pred, lambda mdl: None, copy, mdl)
        assert float(mdl.before[...]) == (-1.0 if pred else 0.0)


def test_variables_that_are_created_from_others_in_a_loop() -> None:
    def step(mdl: Memory, carry: Any) -> Any:
        mdl.created = nnx.Cache(mdl.now[...])
        mdl.now.set_value(mdl.now[...] + 1)
        return carry, None

    mdl = Memory()
    nn.scan(step, {"cache": 0}, variable_carry="batch_stats")(mdl, 0.0)
    assert_trees_equal(mdl.created[...], jnp.array([0.0, 1.0, 2.0]))
    assert float(mdl.now[...]) == 3.0


def test_a_variable_that_is_deleted_in_a_loop() -> None:
    def step(mdl: Memory, carry: Any) -> Any:
        del mdl.each
        return carry, None

    mdl = Memory()
    nn.scan(step, {"cache": 0}, variable_carry="batch_stats")(mdl, 0.0)
    assert not hasattr(mdl, "each")
    assert float(mdl.offset[...]) == 7.0

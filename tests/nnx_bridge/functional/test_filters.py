"""Filters and tangents of NNX Variables: in Linen's words and in NNX's, whole or in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import DenyList

import lifted
from tests.helpers import assert_same_program, assert_trees_equal, call, normal, normal_like, total
from tests.nnx_bridge import models
from tests.nnx_bridge.raw import by_hand

X = normal(4, 3)


def _paths(state: nnx.State) -> set[str]:
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


PARAMS = {"dense/kernel", "dense/bias", "norm/scale", "norm/bias", "out/kernel", "out/bias"}
STATS = {"norm/mean", "norm/var"}
FILTERS: dict[str, tuple[Any, set[str]]] = {
    "True": (True, PARAMS | STATS),
    "a collection": ("params", PARAMS),
    "another collection": ("batch_stats", STATS),
    "collections": (["params", "batch_stats"], PARAMS | STATS),
    "a deny list": (DenyList("params"), STATS),
    "a type": (nnx.Param, PARAMS),
    "a base type": (nnx.Variable, PARAMS | STATS),
    "types": ((nnx.Param, nnx.BatchStat), PARAMS | STATS),
    "a type and a collection": ([nnx.Param, "batch_stats"], PARAMS | STATS),
    "all of NNX": (nnx.All(nnx.Param, nnx.PathContains("dense")), {"dense/kernel", "dense/bias"}),
    "none of NNX": (nnx.Not(nnx.Param), STATS),
    "a predicate": (lambda path, x: path[-1] == "bias", {"dense/bias", "norm/bias", "out/bias"}),
    "a predicate of the whole path": (lambda path, x: path == ("out", "bias"), {"out/bias"}),
    "...": (..., PARAMS | STATS),
}


@pytest.mark.parametrize("name", FILTERS)
def test_what_a_filter_selects(name: str) -> None:
    selected, paths = FILTERS[name]
    mdl = models.make(models.Norm)
    grads, _ = lifted.grad(total, mdl, X, grad_variables=selected)
    assert _paths(grads) == paths


@pytest.mark.parametrize("name", ["a collection", "a type", "all of NNX", "a predicate"])
def test_gradients_of_a_subset_are_those_of_raw_jax(name: str) -> None:
    """What is not selected is frozen."""
    selected, _ = FILTERS[name]
    mdl = models.make(models.Norm)
    grads, _ = lifted.grad(total, models.make(models.Norm), X, grad_variables=selected)
    wrt = nnx.Param if isinstance(selected, str) else selected
    raw = by_hand(lambda f, *args: jax.grad(f, has_aux=True)(*args), total, wrt)
    expected, _ = raw(mdl, X)
    assert_trees_equal(grads, expected)


def test_a_collection_is_exactly_its_type_and_a_type_has_subclasses() -> None:
    class Special(nnx.Param[Any]):
        pass

    class Both(nnx.Module):
        def __init__(self) -> None:
            self.a = nnx.Param(jnp.ones(3))
            self.b = Special(jnp.ones(3))

        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.sum(self.a[...] * self.b[...] * x)

    by_name = lifted.grad(call, Both(), X[0], grad_variables="params")[0]
    by_type = lifted.grad(call, Both(), X[0], grad_variables=nnx.Param)[0]
    assert (_paths(by_name), _paths(by_type)) == ({"a"}, {"a", "b"})


def test_the_gradient_of_a_shared_variable_is_the_sum_and_stands_once() -> None:
    mdl = models.make(models.Shared)
    grads, _ = lifted.grad(total, mdl, X, grad_variables="params")
    assert _paths(grads) <= {"again/kernel", "again/bias", "tied/bias"}

    def unshared(kernels: Any) -> jax.Array:
        first, second, third = kernels
        x = jnp.tanh(X @ first + mdl.first.bias[...])
        x = x @ second + mdl.first.bias[...]
        return jnp.sum(jnp.sin(x @ third + mdl.tied.bias[...]))

    kernel = mdl.first.kernel[...]
    parts = jax.grad(unshared)([kernel] * 3)
    assert jnp.allclose(grads["again"]["kernel"][...], sum(parts), atol=1e-5)


# What is visible.


def _names(mdl: Any, x: jax.Array) -> Any:
    return jnp.sum(x), sorted(_paths(nnx.state(mdl)))


@pytest.mark.parametrize(
    ("visible", "paths"),
    [
        (True, PARAMS | STATS),
        (False, set()),
        ("params", PARAMS),
        (DenyList("params"), STATS),
        (nnx.BatchStat, STATS),
        (["params", nnx.BatchStat], PARAMS | STATS),
    ],
    ids=["all", "none", "a collection", "all but", "a type", "several"],
)
def test_the_visible_variables(visible: Any, paths: set[str]) -> None:
    mdl = models.make(models.Norm)
    _, seen = lifted.grad(_names, mdl, X, variables=visible, has_aux=True)
    assert set(seen) == paths
    assert _paths(nnx.state(mdl)) == PARAMS | STATS


def test_the_variables_of_a_functional_are_the_visible_ones() -> None:
    functional = lifted.functionalize(models.make(models.Norm), variables="params")
    assert _paths(functional.variables) == PARAMS


def test_what_is_differentiated_is_visible_too() -> None:
    mdl = models.make(models.MLP)
    grads, _ = lifted.grad(total, mdl, X, variables=False, grad_variables="params")
    assert_trees_equal(grads, lifted.grad(total, mdl, X, grad_variables="params")[0])


def test_what_has_a_tangent_is_visible_too() -> None:
    mdl = models.make(models.MLP)
    for tangents in ({"params": {}}, nnx.state(mdl, nnx.Param), jax.tree.map(jnp.ones_like, mdl)):
        actual = lifted.jvp(call, mdl, (X,), (X,), tangents, variables=False)
        assert_trees_equal(actual, lifted.jvp(call, mdl, (X,), (X,), tangents))


def test_what_is_hidden_and_written_again_is_kept() -> None:
    """A module may make a new Variable where a hidden one stands; that one is the caller's."""
    mdl = models.make(models.Norm)
    mean = mdl.norm.mean

    def fn(mdl: Any, x: jax.Array) -> jax.Array:
        assert not hasattr(mdl.norm, "mean")
        return jnp.sum(mdl.dense(x))

    lifted.grad(fn, mdl, X, variables="params")
    assert mdl.norm.mean is mean


def test_a_hidden_variable_in_a_container() -> None:
    mdl = models.make(models.Containers)
    state = nnx.state(mdl)
    fn = lambda mdl, x: jnp.sum(mdl.items[0](x))  # noqa: E731
    only = nnx.PathContains("items")
    lifted.grad(fn, mdl, X, variables=only)
    assert_trees_equal(nnx.state(mdl), state)


def test_writes_to_what_is_only_differentiated_reach_the_caller_of_nnx() -> None:
    """NNX has no immutable collections: what is visible can be written."""
    mdl = models.make(models.Norm)
    lifted.grad(total, mdl, X, variables=False, grad_variables=True)
    assert jnp.any(mdl.norm.mean[...] != 0)


class Plain(nnx.Module):
    """Variables in the containers of Python."""

    def __init__(self) -> None:
        make = lambda: [nnx.Param(jnp.ones(3)), nnx.BatchStat(jnp.ones(3))]  # noqa: E731
        self.table = nnx.data({"a": make()[0], "b": make()[1]})
        self.items = nnx.data(make())
        self.pair = nnx.data((*make(), {"c": make()}))

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.table["a"][...] * self.items[0][...] * self.pair[0][...]
        return jnp.sum(self.pair[2]["c"][0][...] * scale * x)


def test_hidden_variables_in_the_containers_of_python() -> None:
    def fn(mdl: Any, x: jax.Array) -> jax.Array:
        assert "b" not in mdl.table
        assert mdl.items[1] is None and mdl.pair[1] is None and mdl.pair[2]["c"][1] is None
        return mdl(x)

    mdl = Plain()
    nodes = [id(node) for _, node in nnx.iter_graph(mdl) if isinstance(node, nnx.Variable)]
    lifted.grad(fn, mdl, X[0], variables="params", grad_variables="params")
    assert nodes == [id(n) for _, n in nnx.iter_graph(mdl) if isinstance(n, nnx.Variable)]


def test_a_hidden_variable_that_is_a_target() -> None:
    count = nnx.BatchStat(jnp.zeros(()))
    fn = lambda targets, x: (total(targets[0], x), targets[1])  # noqa: E731
    targets = models.make(models.MLP), count
    _, seen = lifted.grad(fn, targets, X, variables="params", has_aux=True)
    assert seen is None


def test_what_fn_puts_in_the_place_of_a_hidden_variable_stays() -> None:
    def fn(mdl: Any, x: jax.Array) -> jax.Array:
        mdl.table["b"] = nnx.BatchStat(x)
        mdl.items[1] = nnx.BatchStat(x)
        return mdl(x)

    mdl = Plain()
    lifted.grad(fn, mdl, X[0], variables="params")
    assert_trees_equal(mdl.table["b"][...], X[0])
    assert_trees_equal(mdl.items[1][...], X[0])


# RNG streams.


def _two_streams() -> Any:
    class Two(nnx.Module):
        def __init__(self) -> None:
            self.rngs = nnx.Rngs(dropout=0, noise=1)

        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.sum(x * jax.random.normal(self.rngs.noise(), x.shape))

    return Two()


@pytest.mark.parametrize(
    "rngs", [True, "noise", ["noise"], DenyList("dropout"), nnx.WithTag("noise")], ids=repr
)
def test_a_visible_stream_gives_the_draws_of_a_plain_call(rngs: Any) -> None:
    mdl, plain = _two_streams(), _two_streams()
    y, _ = lifted.value_and_grad(call, mdl, X, rngs=rngs)
    assert_trees_equal(y, plain(X))
    assert_trees_equal(mdl(X), plain(X))  # The draws go on.


@pytest.mark.parametrize("rngs", [False, "dropout", DenyList("noise"), []], ids=repr)
def test_a_stream_that_is_left_out_is_missing(rngs: Any) -> None:
    mdl = _two_streams()
    with pytest.raises(AttributeError, match="count") as error:
        lifted.grad(call, mdl, X, rngs=rngs)
    assert any("rngs/noise/count" in note for note in error.value.__notes__)
    assert mdl.rngs.noise.count[...] == 0


def test_forked_streams() -> None:
    make = lambda: models.Noisy(nnx.Rngs(0, dropout=1).fork())  # noqa: E731
    mdl, plain = make(), make()
    fn = lambda mdl, x: total(mdl, x) + jax.random.normal(mdl.drop.rngs.fork()())  # noqa: E731
    y, _ = lifted.value_and_grad(fn, mdl, X)
    assert jnp.allclose(y, fn(plain, X))
    assert_trees_equal(nnx.state(mdl), nnx.state(plain))


def test_streams_are_targets() -> None:
    make = lambda: (models.make(models.MLP), nnx.Rngs(noise=3))  # noqa: E731

    def fn(targets: Any, x: jax.Array) -> jax.Array:
        mdl, rngs = targets
        return total(mdl, x + jax.random.normal(rngs.noise(), x.shape))

    ours, plain = make(), make()
    y, _ = lifted.value_and_grad(fn, ours, X, grad_variables=False)
    assert jnp.allclose(y, fn(plain, X))
    assert ours[1].noise.count[...] == plain[1].noise.count[...] == 1


# Tangents.

KERNEL = normal(3, 3, seed=9)


def _state(*names: str) -> nnx.State:
    """Tangents of the kernel as a state of the Variables whose names are given."""
    state = nnx.state(models.make(models.Norm), nnx.Param)
    zeros = jax.tree.map(jnp.zeros_like, state)
    zeros["dense"]["kernel"] = nnx.Param(KERNEL)
    flat = [(p, v) for p, v in nnx.to_flat_state(zeros) if "/".join(map(str, p)) in names]
    return nnx.from_flat_state(flat)


def _module() -> nnx.Module:
    zeros = jax.tree.map(
        lambda x: jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
        models.make(models.Norm),
    )
    zeros.dense.kernel[...] = KERNEL
    return zeros


TANGENTS: dict[str, Callable[[], Any]] = {
    "a state of one": lambda: _state("dense/kernel"),
    "a state of some": lambda: _state("dense/kernel", "dense/bias", "out/kernel"),
    "a state of all parameters": lambda: _state(*PARAMS),
    "a pure state": lambda: nnx.State({"dense": {"kernel": KERNEL}}),
    "a state with None": lambda: nnx.State({"dense": {"kernel": KERNEL, "bias": None}}),
    "a dict of collections": lambda: {"params": {"dense": {"kernel": KERNEL}}},
    "a dict with None": lambda: {"params": {"dense": {"kernel": KERNEL}, "out": None}},
    "a dict with an empty collection": lambda: {
        "params": {"dense": {"kernel": KERNEL}},
        "batch_stats": {},
    },
    "a dict of Variables": lambda: {"params": {"dense": {"kernel": nnx.Param(KERNEL)}}},
    "a dict by attributes": lambda: {"dense": {"kernel": KERNEL}},
    "a module": _module,
}


@pytest.mark.parametrize("form", TANGENTS)
def test_tangents_in_every_form(form: str) -> None:
    mdl = models.make(models.Norm)
    _, y_dot = lifted.jvp(call, mdl, (X,), (None,), TANGENTS[form]())

    state = nnx.split(models.make(models.Norm))

    def of_kernel(kernel: jax.Array) -> jax.Array:
        mdl = nnx.merge(*state, copy=True)
        mdl.dense.kernel = nnx.Param(kernel)
        return mdl(X)

    kernel = models.make(models.Norm).dense.kernel[...]
    expected = jax.jvp(of_kernel, (kernel,), (KERNEL,))[1]
    assert jnp.allclose(y_dot, expected, atol=1e-5)


@pytest.mark.parametrize("nothing", [None, {}, {"params": {}}, {"params": None}, nnx.State({})])
def test_no_tangents_mean_zero(nothing: Any) -> None:
    _, y_dot = lifted.jvp(call, models.make(models.MLP), (X,), (None,), nothing)
    assert not jnp.any(y_dot)


@pytest.mark.parametrize(
    "form", ["a state of one", "a dict of collections", "a dict by attributes"]
)
def test_partial_tangents_differentiate_nothing_else(form: str) -> None:
    """The program is that of raw JAX with respect to this leaf alone."""
    mdl = models.make(models.MLP)
    graphdef, state = nnx.split(mdl)
    tangent = {
        "a state of one": nnx.State({"first": {"kernel": nnx.Param(KERNEL)}}),
        "a dict of collections": {"params": {"first": {"kernel": KERNEL}}},
        "a dict by attributes": {"first": {"kernel": KERNEL}},
    }[form]

    def actual(state: nnx.State, x: jax.Array) -> Any:
        return lifted.jvp(call, nnx.merge(graphdef, state, copy=True), (x,), (None,), tangent)

    def expected(state: nnx.State, x: jax.Array) -> Any:
        def of_kernel(kernel: jax.Array) -> jax.Array:
            mdl = nnx.merge(graphdef, state, copy=True)
            mdl.first.kernel = nnx.Param(kernel)
            return mdl(x)

        return jax.jvp(of_kernel, (state["first"]["kernel"].get_value(),), (KERNEL,))

    assert_same_program(actual, expected, state, X)


def test_tangents_of_a_pytree_of_modules() -> None:
    pair = {"a": models.make(models.MLP), "b": models.make(models.MLP, 1)}
    fn = lambda mdls, x: mdls["a"](x) + mdls["b"](x)  # noqa: E731
    tangents = {"a": None, "b": {"params": {"first": {"kernel": KERNEL}}}}
    _, actual = lifted.jvp(fn, pair, (X,), (None,), tangents)
    _, expected = lifted.jvp(call, pair["b"], (X,), (None,), tangents["b"])
    assert jnp.allclose(actual, expected, atol=1e-6)


def test_tangents_of_a_shared_submodule_stand_where_its_gradients_stand() -> None:
    mdl = models.make(models.Shared)
    grads, _ = lifted.grad(total, mdl, X, grad_variables="params")
    t_params = normal_like(grads)
    _, y_dot = lifted.jvp(total, mdl, (X,), (None,), t_params)
    products = jax.tree.map(lambda g, t: jnp.vdot(g, t), grads, t_params)
    assert jnp.allclose(y_dot, sum(jax.tree.leaves(products)), rtol=1e-4)


def test_tangents_of_written_variables() -> None:
    mdl = models.make(models.Norm)
    t_x = normal_like(X)
    _, _, dots = lifted.jvp(call, mdl, (X,), (t_x,), {}, return_variable_tangents=True)
    graphdef, state = nnx.split(models.make(models.Norm))

    def statistics(x: jax.Array) -> nnx.State:
        mdl = nnx.merge(graphdef, state, copy=True)
        mdl(x)
        return nnx.state(mdl, nnx.BatchStat)

    assert_trees_equal(dots, jax.jvp(statistics, (X,), (t_x,))[1])


def test_tangents_of_created_variables() -> None:
    def fn(mdl: Any, x: jax.Array) -> jax.Array:
        mdl.seen = nnx.Variable(x**2)
        return mdl(x)

    mdl = models.make(models.MLP)
    _, _, dots = lifted.jvp(fn, mdl, (X,), (X,), {}, return_variable_tangents=True)
    assert _paths(dots) == {"seen"}
    assert_trees_equal(dots["seen"].get_value(), 2 * X * X)


def test_linearize_takes_partial_tangents() -> None:
    mdl = models.make(models.MLP)
    _, f_jvp = lifted.linearize(call, mdl, X, grad_variables="params")
    given = {"params": {"first": {"kernel": KERNEL}}}
    _, expected = lifted.jvp(call, mdl, (X,), (None,), given)
    assert jnp.allclose(f_jvp(given, None), expected, atol=1e-6)

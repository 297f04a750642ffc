"""Transforms of NNX modules in any order with those of NNX and of JAX, in every mode of NNX."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import lifted
from tests.helpers import (
    assert_trees_close,
    assert_trees_equal,
    call,
    initialized,
    normal,
    normal_like,
    strict,
    total,
)
from tests.lifted.models import Norm
from tests.nnx_bridge import models
from tests.nnx_bridge.raw import by_hand

X = normal(4, 3)
MODEL = models.Norm
GRAPHDEF, STATE = nnx.split(models.make(MODEL))


def gradient(mdl: Any, x: jax.Array) -> jax.Array:
    return lifted.grad(total, mdl, x)[0]


_RAW = by_hand(lambda f, *args: jax.grad(f, argnums=2, has_aux=True)(*args), total)


def raw_gradient(state: nnx.State, x: jax.Array) -> tuple[jax.Array, nnx.State]:
    """What `gradient` is, as a pure function: the gradient, and the state afterwards."""
    return _RAW(nnx.merge(GRAPHDEF, state, copy=True), x)


def our_gradient(state: nnx.State, x: jax.Array) -> tuple[jax.Array, nnx.State]:
    mdl = nnx.merge(GRAPHDEF, state, copy=True)
    return gradient(mdl, x), nnx.state(mdl)


# Inside the transforms of JAX, over the pure function.

Pure = Callable[[nnx.State, jax.Array], tuple[jax.Array, nnx.State]]
JAX: dict[str, Callable[[Pure], Any]] = {
    "jit": lambda f: jax.jit(f)(STATE, X),
    "grad": lambda f: jax.jit(jax.grad(lambda x: f(STATE, x)[0].sum()))(X),
    "jvp": lambda f: jax.jvp(lambda x: f(STATE, x), (X,), (X,)),
    "vmap": lambda f: jax.jit(jax.vmap(lambda x: f(STATE, x)))(jnp.stack([X, 2 * X])),
    "scan": lambda f: jax.lax.scan(lambda s, x: f(s, x)[::-1], STATE, jnp.stack([X, 2 * X])),
    "checkpoint": lambda f: jax.jit(jax.grad(lambda x: jax.checkpoint(f)(STATE, x)[0].sum()))(X),
    "cond": lambda f: jax.lax.cond(X.sum() > 0, f, lambda s, x: (x, s), STATE, X),
    "while_loop": lambda f: jax.lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, *f(c[2], c[1])[::1]), (0, X, STATE)
    ),
    "eval_shape": lambda f: jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(f, STATE, X)),
    "shard_map": lambda f: jax.jit(
        jax.shard_map(
            lambda x: f(STATE, x)[0],
            mesh=jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,)),
            in_specs=P("i"),
            out_specs=P("i"),
        )
    )(X),
}


@pytest.mark.parametrize("name", JAX)
def test_inside_a_jax_transform(name: str) -> None:
    with jax.checking_leaks():
        actual = JAX[name](our_gradient)
    assert_trees_close(actual, JAX[name](raw_gradient), factor=8)


# Inside the transforms of NNX, on the module itself.


def _nnx_scan(f: Any, mdl: Any) -> Any:
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def run(mdl: Any, x: jax.Array) -> Any:
        return mdl, f(mdl, x)

    return run(mdl, jnp.stack([X, 2 * X]))[1]


def _nnx_custom_vjp(f: Any, mdl: Any) -> Any:
    @nnx.custom_vjp
    def fn(mdl: Any, x: jax.Array) -> jax.Array:
        return f(mdl, x).sum()

    def fwd(mdl: Any, x: jax.Array) -> Any:
        return fn(mdl, x), x

    def bwd(x: jax.Array, g: Any) -> Any:
        (m_g, _), y_g = g
        return m_g, y_g * x

    fn.defvjp(fwd, bwd)
    return nnx.grad(fn, argnums=1)(mdl, X)


def _nnx_vmap(f: Any, mdl: Any) -> Any:
    @nnx.vmap(in_axes=(nnx.StateAxes({nnx.BatchStat: None, ...: None}), 0))
    def run(mdl: Any, x: jax.Array) -> Any:
        mdl = nnx.clone(mdl)
        return f(mdl, x)

    return run(mdl, jnp.stack([X, 2 * X]))


NNX: dict[str, Callable[[Any, Any], Any]] = {
    "jit": lambda f, mdl: nnx.jit(f)(mdl, X),
    "grad": lambda f, mdl: nnx.grad(lambda m, x: f(m, x).sum())(mdl, X),
    "value_and_grad": lambda f, mdl: nnx.value_and_grad(lambda m, x: f(m, x).sum())(mdl, X),
    "vmap": _nnx_vmap,
    "scan": _nnx_scan,
    "remat": lambda f, mdl: nnx.grad(lambda m, x: nnx.remat(f)(m, x).sum())(mdl, X),
    "cond": lambda f, mdl: nnx.cond(X.sum() > -99, f, lambda m, x: x, mdl, X),
    "switch": lambda f, mdl: nnx.switch(1, [lambda m, x: x, f], mdl, X),
    "while_loop": lambda f, mdl: nnx.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1], f(c[1], c[2])), (0, mdl, X)
    )[2],
    "fori_loop": lambda f, mdl: nnx.fori_loop(0, 2, lambda i, c: (c[0], f(c[0], c[1])), (mdl, X))[
        1
    ],
    "custom_vjp": _nnx_custom_vjp,
    "eval_shape": lambda f, mdl: jnp.zeros(nnx.eval_shape(f, mdl, X).shape),
    "jit of grad": lambda f, mdl: nnx.jit(nnx.grad(lambda m, x: f(m, x).sum()))(mdl, X),
}


def by_jax(mdl: Any, x: jax.Array) -> jax.Array:
    """`gradient` by hand, as one would write it inside of a model."""
    graphdef, state = nnx.split(mdl)

    def pure(x: jax.Array) -> Any:
        copy = nnx.merge(graphdef, state, copy=True)
        return total(copy, x), nnx.state(copy)

    grad, state = jax.grad(pure, has_aux=True)(x)
    nnx.update(mdl, state)
    return grad


@pytest.mark.parametrize("name", NNX)
def test_inside_an_nnx_transform(name: str) -> None:
    ours, plain = models.make(MODEL), models.make(MODEL)
    actual = NNX[name](gradient, ours)
    assert_trees_close(actual, NNX[name](by_jax, plain), factor=8)
    assert_trees_close(nnx.state(ours), nnx.state(plain), factor=8)


def _first_again(mdl: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(mdl.first(x))


def _with_custom_vjp(mdl: Any, x: jax.Array) -> jax.Array:
    @nnx.custom_vjp
    def fn(mdl: Any, x: jax.Array) -> jax.Array:
        return mdl(x)

    def fwd(mdl: Any, x: jax.Array) -> Any:
        return fn(mdl, x), (mdl, x)

    def bwd(residual: Any, g: Any) -> Any:
        (_, _), y_g = g
        mdl, x = residual
        _, transpose = jax.vjp(lambda m, x: m(x), mdl, x)
        m_g, x_g = transpose(y_g)
        return jax.tree.map(lambda g: 2 * g, nnx.state(m_g)), 3 * x_g

    fn.defvjp(fwd, bwd)
    return fn(mdl, x)


AROUND: dict[str, Callable[..., Any]] = {
    "jit": nnx.jit(call),
    "grad": nnx.grad(total),
    "scan": lambda mdl, x: nnx.scan(
        lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)
    )(mdl, x[None])[1],
    "remat": nnx.remat(call),
    "vmap": lambda mdl, x: nnx.vmap(call, in_axes=(None, 0))(mdl, x),
    "cond": lambda mdl, x: nnx.cond(x.sum() > -99, call, lambda m, x: m(2 * x), mdl, x),
    "switch": lambda mdl, x: nnx.switch(1, [lambda m, x: m(2 * x), call], mdl, x),
    "fori_loop": lambda mdl, x: nnx.fori_loop(
        0, 2, lambda i, c: (c[0], _first_again(*c)), (mdl, x)
    )[1],
    "while_loop": lambda mdl, x: nnx.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1], _first_again(*c[1:])), (0, mdl, x)
    )[2],
    "custom_vjp": _with_custom_vjp,
}
ONE_WAY = {"while_loop": "jvp", "custom_vjp": "grad"}  # What JAX can do with them.


@pytest.mark.parametrize("mode", ["grad", "jvp"])
@pytest.mark.parametrize("name", AROUND)
def test_around_an_nnx_transform(name: str, mode: str) -> None:
    """`fn` itself uses a transform of NNX."""
    if ONE_WAY.get(name, mode) != mode:
        pytest.skip(f"JAX differentiates {name} with {ONE_WAY[name]} only")

    def fn(mdl: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jax.tree.leaves(AROUND[name](mdl, x))[0]))

    mdl = models.make(models.MLP)
    graphdef, state = nnx.split(mdl)
    pure = lambda state, x: fn(nnx.merge(graphdef, state, copy=True), x)  # noqa: E731
    if mode == "grad":
        actual = lifted.grad(fn, mdl, X, grad_variables=nnx.Param)
        expected = jax.grad(pure, argnums=(0, 1))(state, X)
    else:
        tangents = normal_like(state)
        actual = lifted.jvp(fn, mdl, (X,), (X,), tangents)
        expected = jax.jvp(pure, (state, X), (tangents, X))
    assert_trees_close(actual, expected, factor=8)


@pytest.mark.parametrize("name", ["cond", "switch"])
def test_what_a_branch_writes_is_written(name: str) -> None:
    ours, plain = models.make(MODEL), models.make(MODEL)
    with strict():
        lifted.grad(lambda mdl, x: jnp.sum(AROUND[name](mdl, x)), ours, X)
    AROUND[name](plain, X)
    assert_trees_close(nnx.state(ours), nnx.state(plain))


# Inside of modules.


def test_inside_a_method_on_a_submodule() -> None:
    """The energy and the forces of an interatomic potential, trained through the forces."""

    class Potential(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.net = MODEL(rngs)
            self.calls = nnx.Variable(jnp.int32(0))

        def __call__(self, x: jax.Array) -> Any:
            self.calls[...] += 1
            energy, (grad,) = lifted.value_and_grad(total, self.net, x)
            return energy, -grad

    mdl = models.make(Potential)
    graphdef, state = nnx.split(models.make(Potential))

    def loss(mdl: Any, x: jax.Array) -> jax.Array:
        energy, forces = mdl(x)
        return energy**2 + jnp.sum(forces**2)

    def raw(params: nnx.State, rest: nnx.State) -> jax.Array:
        def energy(x: jax.Array) -> jax.Array:
            return total(nnx.merge(graphdef, params, rest, copy=True).net, x)

        value, grad = jax.value_and_grad(energy)(X)
        return value**2 + jnp.sum(grad**2)

    grads = nnx.grad(loss)(mdl, X)
    assert_trees_close(grads, jax.grad(raw)(*nnx.split_state(state, nnx.Param, ...)), factor=8)
    assert mdl.calls[...] == 1
    assert jnp.any(mdl.net.norm.mean[...] != 0)


def test_inside_a_method_on_self() -> None:
    class Score(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.net = models.MLP(rngs)
            self.calls = nnx.Variable(jnp.int32(0))

        def log_density(self, x: jax.Array) -> jax.Array:
            self.calls[...] += 1
            return total(self.net, x)

        def __call__(self, x: jax.Array) -> jax.Array:
            return lifted.grad(Score.log_density, self, x)[0]

    mdl = models.make(Score)
    net = mdl.net
    assert_trees_equal(mdl(X), jax.grad(lambda x: total(net, x))(X))
    assert mdl.calls[...] == 1
    assert mdl.net is net


def test_a_bound_method() -> None:
    mdl = models.make(models.MLP)
    actual = lifted.jvp(mdl.__call__, mdl, (X,), (X,), {})
    assert_trees_equal(actual, jax.jvp(mdl, (X,), (X,)))


def test_inside_a_scanned_layer() -> None:
    """google/flax #4771, on NNX."""

    class Step(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.net = models.Layer(rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + lifted.grad(total, self.net, x)[0]

    def stack(kind: Any) -> Any:
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs: nnx.Rngs) -> Any:
            return kind(rngs)

        return make(nnx.Rngs(0))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x: jax.Array, layer: Any) -> jax.Array:
        return layer(x)

    layers, plain = stack(Step), stack(Step)
    y = run(X, layers)
    expected = X
    for i in range(2):
        graphdef, state = nnx.split(plain)
        layer = nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state), copy=True)
        expected = expected + by_jax(layer.net, expected)
    assert_trees_close(y, expected, factor=8)
    assert_trees_equal(layers.net.drop.rngs.count[...], jnp.ones(2, jnp.uint32))


# With themselves.


def test_states_are_primals_and_outputs_like_any_pytree() -> None:
    mdl = models.make(models.MLP)
    state = nnx.state(models.make(models.MLP, 1), nnx.Param)

    def fn(mdl: Any, state: nnx.State) -> nnx.State:
        nnx.update(mdl, jax.tree.map(lambda a, b: a * b, nnx.state(mdl), state))
        return nnx.state(mdl)

    products, dots = lifted.jvp(fn, mdl, (state,), (state,), {})
    assert_trees_equal(nnx.state(mdl), products)
    assert_trees_equal(dots, products)


def test_a_bare_variable_among_the_outputs_is_a_value() -> None:
    weight = nnx.Param(jnp.arange(3.0))
    square = lambda w, x: jnp.sum(w[...] ** 2 * x)  # noqa: E731
    gradient = lambda w, x: lifted.grad(square, w, x, grad_variables=True)[0]  # noqa: E731
    _, dot = lifted.jvp(gradient, weight, (X[0],), (X[0],), None)
    assert_trees_equal(dot.get_value(), 2 * weight[...] * X[0])


def test_forward_over_reverse_over_forward() -> None:
    def second(mdl: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(lifted.jvp(gradient, mdl, (x,), (x,), {})[1] ** 2)

    mdl = models.make(models.MLP)
    fn = lambda mdl, x: lifted.grad(second, mdl, x, grad_variables="params")  # noqa: E731
    with jax.checking_leaks():
        actual = lifted.jvp(fn, mdl, (X,), (X,), {})
    graphdef, state = nnx.split(mdl)

    def raw(state: nnx.State, x: jax.Array) -> jax.Array:
        grad = jax.grad(lambda x: total(nnx.merge(graphdef, state, copy=True), x))
        return jnp.sum(jax.jvp(grad, (x,), (x,))[1] ** 2)

    expected = jax.jvp(lambda x: jax.grad(raw, argnums=(0, 1))(state, x), (X,), (X,))
    assert_trees_equal(jax.tree.leaves(actual), jax.tree.leaves(expected))


def test_linen_and_nnx_modules_in_one_call() -> None:
    linen = Norm().bind(initialized(Norm(), X), mutable=["batch_stats"])
    native = models.make(MODEL)
    fn = lambda mdls, x: total(mdls[0], x) * total(mdls[1], x)  # noqa: E731
    grads, _ = lifted.grad(fn, (linen, native), X, grad_variables="params")
    of_native, _ = lifted.grad(total, models.make(MODEL), X, grad_variables="params")
    scale = total(Norm().bind(linen.variables, mutable=["batch_stats"]), X)
    assert_trees_close(grads[1], jax.tree.map(lambda g: g * scale, of_native), factor=8)
    assert set(grads[0]) == {"params"}


# In every mode of NNX.

MODES: dict[str, Callable[[], Any]] = {
    "graph": contextlib.nullcontext,
    "tree": lambda: nnx.set_graph_mode(False),
    "no graph updates": lambda: nnx.set_graph_updates(False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", ["norm", "noisy", "counter", "stacked"])
def test_every_mode(mode: str, model: str) -> None:
    kind = models.MODELS[model]
    if mode != "graph" and model == "stacked":
        pytest.skip("nnx.split_rngs and the nnx.vmap below it need graph mode")
    ours, plain = models.make(kind), models.make(kind)
    expected = by_jax(plain, X)
    with MODES[mode](), strict():
        actual = gradient(ours, X)
    assert_trees_close(actual, expected)
    assert_trees_close(nnx.state(ours), nnx.state(plain))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_under_jit(mode: str) -> None:
    ours, plain = models.make(MODEL), models.make(MODEL)
    expected = by_jax(plain, X)
    with MODES[mode]():
        actual = nnx.jit(gradient)(ours, X)
    assert_trees_close(actual, expected)
    assert_trees_close(nnx.state(ours), nnx.state(plain))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_with_variable_gradients_and_tangents(mode: str) -> None:
    mdl = models.make(models.Noisy)
    expected = lifted.hvp(
        total, mdl, (X,), (X,), nnx.state(mdl, nnx.Param), grad_variables=nnx.Param
    )
    with MODES[mode]():
        mdl = models.make(models.Noisy)
        direction = nnx.state(mdl, nnx.Param)
        actual = lifted.hvp(total, mdl, (X,), (X,), direction, grad_variables=nnx.Param)
    assert_trees_equal(actual, expected)


def test_transforms_of_compat() -> None:
    """The transforms of the tree mode, under their own names."""
    ours, plain = models.make(MODEL), models.make(MODEL)
    grad = lambda f: nnx.compat.jit(f)  # noqa: E731
    assert_trees_close(grad(gradient)(ours, X), by_jax(plain, X))
    assert_trees_close(nnx.state(ours), nnx.state(plain))

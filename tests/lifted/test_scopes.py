"""`flax.core.Scope` as the target: the return shapes are those of modules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax.core import Scope, apply, init, lift, nn

import lifted
from tests.helpers import assert_trees_close, assert_trees_equal, normal, strict

X = normal(4, 3)


def _dense(scope: Scope, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(nn.dense(scope, x, 2)))


def _with_aux(scope: Scope, x: jax.Array) -> Any:
    y = _dense(scope, x)
    return y, {"value": y}


def _scope() -> Scope:
    _, variables = init(_dense)(jax.random.key(0), X)
    return Scope(variables)


def test_value_and_grad() -> None:
    y, (grad,) = lifted.value_and_grad(_dense, _scope(), X)
    assert (y.shape, grad.shape) == ((), X.shape)


def test_value_and_grad_with_aux_pairs_the_value_with_the_aux() -> None:
    (y, aux), (grad,) = lifted.value_and_grad(_with_aux, _scope(), X, has_aux=True)
    assert_trees_equal(aux["value"], y)
    assert grad.shape == X.shape


def test_grad_with_aux() -> None:
    (grad,), aux = lifted.grad(_with_aux, _scope(), X, has_aux=True)
    assert grad.shape == X.shape
    assert set(aux) == {"value"}


def test_gradients_of_variables() -> None:
    scope = _scope()
    grads, _ = lifted.grad(_dense, scope, X, grad_variables="params")
    assert jax.tree.structure(grads) == jax.tree.structure({"params": scope.variables()["params"]})


def test_vjp_agrees_with_flax() -> None:
    y, bwd = lifted.vjp(_dense, _scope(), X)
    expected_y, expected_bwd = lift.vjp(_dense, _scope(), X)
    assert_trees_equal(y, expected_y)
    assert_trees_equal(tuple(bwd(1.0)), tuple(expected_bwd(jnp.float32(1))))


def test_the_example_of_the_documentation_of_jvp() -> None:
    def learn_scale(scope: Scope, x: jax.Array) -> jax.Array:
        return scope.param("scale", lambda key, shape: jnp.full(shape, 2.0), ()) * x

    def f(scope: Scope, x: jax.Array) -> Any:
        vars_t = jax.tree.map(jnp.ones_like, scope.variables().get("params", {}))
        return lifted.jvp(
            learn_scale, scope, (x,), (jnp.zeros_like(x),), variable_tangents={"params": vars_t}
        )

    (y, _), variables = init(f)(jax.random.key(0), X)
    y, y_dot = apply(f)(variables, X)
    assert_trees_equal((y, y_dot), (2 * X, X))


def test_writes_of_a_scope() -> None:
    def counts(scope: Scope, x: jax.Array) -> jax.Array:
        count = scope.variable("state", "count", lambda: jnp.int32(0))
        count.value += 1
        return _dense(scope.push("dense", reuse=True), x)

    _, variables = init(counts)(jax.random.key(0), X)
    with strict():
        _, updates = apply(lambda s, x: lifted.grad(counts, s, x), mutable="state")(variables, X)
    assert updates["state"]["count"] == 2


def test_a_pair_of_scopes() -> None:
    def both(scopes: Any, x: jax.Array) -> jax.Array:
        return _dense(scopes[0], x) * _dense(scopes[1], x)

    def model(scope: Scope, x: jax.Array) -> Any:
        pair = scope.child(lambda s: s, "a")(), scope.child(lambda s: s, "b")()
        return lifted.grad(both, pair, x, grad_variables="params")

    _, variables = init(model)(jax.random.key(0), X)
    (grads_a, grads_b), _ = apply(model)(variables, X)

    def loss(params: Any) -> jax.Array:
        a, b = Scope({"params": params["a"]}), Scope({"params": params["b"]})
        return _dense(a, X) * _dense(b, X)

    expected = jax.grad(loss)(variables["params"])
    actual = {"a": grads_a["params"], "b": grads_b["params"]}
    assert_trees_close(actual, expected)


def test_a_scope_and_a_scope_below_it() -> None:
    def model(scope: Scope, x: jax.Array) -> Any:
        below = scope.push("below", reuse=True)
        fn = lambda scopes, x: _dense(scopes[1], x) + _dense(scopes[0], x)  # noqa: E731
        return lifted.grad(fn, (scope, below), x, grad_variables="params")

    _, variables = init(model)(jax.random.key(0), X)
    (of_scope, of_below), _ = apply(model)(variables, X)
    assert set(of_scope["params"]) == {"kernel", "bias", "below"}
    assert of_below == {}

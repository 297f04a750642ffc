"""The transforms in any order with JAX's and Linen's, and with everything else Linen modules do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import lifted
from tests.helpers import (
    Inside,
    assert_trees_close,
    assert_trees_equal,
    call,
    initialized,
    normal,
    strict,
    total,
)
from tests.lifted import models
from tests.lifted.transforms import RNGS, input_gradient

X = normal(4, 3)


def _raw_grad(module: nn.Module, variables: Any) -> Callable[..., Any]:
    return jax.grad(lambda x: total(module.bind(variables), x))


# Within and around raw JAX.

MODEL = Inside(models.MLP(), input_gradient)
VARIABLES = initialized(MODEL, X)
RAW = _raw_grad(models.MLP(), {"params": VARIABLES["params"]["inner"]})
AROUND: dict[str, Callable[..., Any]] = {
    "jit": jax.jit,
    "vmap": jax.vmap,
    "grad": lambda f: jax.grad(lambda x: f(x).sum()),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,)),
    "vjp": lambda f: lambda x: jax.vjp(f, x)[1](x),
    "jacfwd": jax.jacfwd,
    "checkpoint": lambda f: jax.grad(lambda x: jax.checkpoint(f)(x).sum()),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), c), x, None, length=2),
    "cond": lambda f: lambda x: jax.lax.cond(x.sum() > 0, f, lambda x: x, x),
    "jit of vmap of grad": lambda f: jax.jit(jax.vmap(jax.grad(lambda x: f(x).sum()))),
}


@pytest.mark.parametrize("name", AROUND)
def test_inside_a_raw_transform(name: str) -> None:
    ours = AROUND[name](lambda x: MODEL.apply(VARIABLES, x))
    with strict():
        assert_trees_close(ours(X), AROUND[name](RAW)(X), factor=4)


WITHIN: dict[str, Callable[..., Any]] = {
    "jit": lambda f: jax.jit(lambda x: f(x)),
    "checkpoint": lambda f: jax.checkpoint(lambda x: f(x)),
    "vmap": lambda f: lambda x: jax.vmap(f)(x),
    "custom_jvp": lambda f: lambda x: nn.relu(f(x)),
}


@pytest.mark.parametrize("name", WITHIN)
def test_around_a_raw_transform(name: str) -> None:
    fn = lambda mdl, x: jnp.sum(jnp.sin(WITHIN[name](mdl)(x)))  # noqa: E731
    module = models.MLP()
    variables = initialized(module, X)
    with strict():
        (actual,) = lifted.grad(fn, module.bind(variables), X)
    assert_trees_close(actual, jax.grad(lambda x: fn(module.bind(variables), x))(X))


def test_a_function_with_its_own_vjp() -> None:
    @jax.custom_vjp
    def clipped(x: jax.Array) -> jax.Array:
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, t: (jnp.clip(t, -0.1, 0.1),))
    bound = models.MLP().bind(initialized(models.MLP(), X))
    (grad,) = lifted.grad(lambda mdl, x: jnp.sum(clipped(mdl(x))), bound, X)
    assert_trees_equal(grad, jax.grad(lambda x: jnp.sum(clipped(bound(x))))(X))


def test_a_lifted_custom_vjp() -> None:
    class Clipped(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            def forward(mdl: nn.Module, x: jax.Array) -> Any:
                return nn.vjp(lambda mdl, x: mdl(x), mdl, x)

            backward = lambda vjp, t: vjp(jnp.clip(t, -0.1, 0.1))  # noqa: E731
            return nn.custom_vjp(call, forward, backward)(models.MLP(), x)

    module = Clipped()
    variables = initialized(module, X)
    grads = lifted.grad(total, module.bind(variables), X, grad_variables="params")
    expected = jax.grad(lambda v, x: total(module.bind(v), x), argnums=(0, 1))(variables, X)
    assert_trees_equal(grads, expected)


# Within and around Linen's.

LINEN: dict[str, Callable[..., Any]] = {
    "vmap": lambda cls: nn.vmap(
        cls, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}
    ),
    "remat": nn.remat,
    "jit": nn.jit,
    "map_variables": lambda cls: nn.map_variables(
        cls, "params", lambda v: jax.tree.map(lambda x: 2 * x, v), init=True
    ),
}


class _GradModel(nn.Module):
    """A transform inside of a module that is transformed by Linen."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return lifted.grad(total, models.MLP(), x)[0]


class _RawGradModel(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = models.MLP()
        inner(x)
        return jax.grad(lambda x: total(inner, x))(x)


@pytest.mark.parametrize("name", LINEN)
def test_inside_a_linen_transform(name: str) -> None:
    ours, raw = (LINEN[name](cls)() for cls in (_GradModel, _RawGradModel))
    rename = lambda v: jax.tree.leaves(v)  # noqa: E731
    assert_trees_equal(rename(ours.init(RNGS, X)), rename(raw.init(RNGS, X)))
    variables = ours.init(RNGS, X)
    raw_variables = raw.init(RNGS, X)
    assert_trees_close(ours.apply(variables, X), raw.apply(raw_variables, X))


@pytest.mark.parametrize("name", LINEN)
def test_around_a_linen_transform(name: str) -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return LINEN[name](models.MLP)(name="inner")(x)

    variables = initialized(Model(), X)
    with strict():
        grads = lifted.grad(total, Model().bind(variables), X, grad_variables="params")
    expected = jax.grad(lambda v, x: total(Model().bind(v), x), argnums=(0, 1))(variables, X)
    assert_trees_close(grads, expected)


def test_inside_a_linen_scan() -> None:
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: Any) -> Any:
            (grad,) = lifted.grad(total, models.Norm(), x)
            return x + grad, None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            axes = {"params": 0, "batch_stats": 0}
            return nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=2)()(
                x, None
            )[0]

    variables = Model().init(RNGS, X)
    with strict():
        y, updates = Model().apply(variables, X, mutable=["batch_stats"])
    x, means = X, []
    for i in range(2):
        layer = jax.tree.map(lambda v, i=i: v[i], variables)
        layer = {c: v["ScanStep_0"]["Norm_0"] for c, v in layer.items()}

        def loss(x: jax.Array, layer: Any = layer) -> Any:
            y, stats = models.Norm().apply(layer, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), stats

        grad, stats = jax.grad(loss, has_aux=True)(x)
        x = x + grad
        means.append(stats["batch_stats"]["BatchNorm_0"]["mean"])
    assert_trees_close(y, x, factor=4)
    actual = updates["batch_stats"]["ScanStep_0"]["Norm_0"]["BatchNorm_0"]["mean"]
    assert_trees_close(actual, jnp.stack(means), factor=4)


def test_jacobian_over_scanned_layers() -> None:
    """google/flax #4771."""
    module = models.Scanned()
    variables = initialized(module, X[0])
    (actual,) = lifted.jacfwd(call, module.bind(variables), X[0])
    (reverse,) = lifted.jacrev(call, module.bind(variables), X[0])
    assert_trees_equal(actual, jax.jacfwd(module.bind(variables))(X[0]))
    assert_trees_close(actual, reverse)


# With themselves.


def _second(mdl: nn.Module, x: jax.Array) -> jax.Array:
    _, dot = lifted.jvp(lambda m, x: lifted.grad(total, m, x)[0], mdl, (x,), (x,), {})
    return jnp.sum(dot**2)


def test_forward_over_reverse_over_forward_over_reverse() -> None:
    module = models.MLP()
    variables = initialized(module, X)
    bound = module.bind(variables)

    def raw(variables: Any, x: jax.Array) -> jax.Array:
        grad = jax.grad(lambda x: total(module.bind(variables), x))
        return jnp.sum(jax.jvp(grad, (x,), (x,))[1] ** 2)

    gradient = lambda m, x: lifted.grad(_second, m, x, grad_variables="params")  # noqa: E731
    actual = lifted.jvp(gradient, bound, (X,), (X,), {})
    expected = jax.jvp(lambda x: jax.grad(raw, argnums=(0, 1))(variables, x), (X,), (X,))
    assert_trees_equal(actual, expected)


def test_hvp_is_forward_over_reverse() -> None:
    bound = models.MLP().bind(initialized(models.MLP(), X))
    inner = lambda m, x: lifted.grad(total, m, x)  # noqa: E731
    _, expected = lifted.jvp(inner, bound, (X,), (X,), {})
    assert_trees_equal(lifted.hvp(total, bound, (X,), (X,)), expected)


def test_writes_of_nested_transforms_happen_once() -> None:
    module = models.Counter()
    variables = module.init(RNGS, X)
    nested = lambda mdl, x: lifted.jvp(input_gradient, mdl, (x,), (x,), {})  # noqa: E731
    with strict():
        _, updates = nn.apply(nested, module, mutable=["state"])(variables, X)
    assert updates["state"]["count"] == 1


# What modules do.

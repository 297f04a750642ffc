"""The lifted program is the raw program: the jaxpr of a transform on a module is that of the raw
JAX transform on the pure function of it that one would write by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.core.scope import Scope

import lifted
from tests.helpers import assert_same_program, initialized, normal, normal_like, total
from tests.lifted import models

MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "mlp": (models.MLP(), (4,)),
    "encoder": (models.Encoder(layers=12), (3, 4)),
    "small_encoder": (models.Encoder(layers=1), (3, 4)),
    "batch_norm": (models.Norm(), (4, 3)),
    "scanned": (models.Scanned(), (4,)),
    "boxed": (models.Boxed(), (4,)),
}

# Tracing the deep one takes seconds, so it stands in the tests of the most used transforms only.
SMALL = [name for name in MODELS if name != "encoder"]


def _split(variables: Any) -> tuple[Any, Any]:
    """Parameters, and everything else."""
    return {"params": variables["params"]}, {k: v for k, v in variables.items() if k != "params"}


def _pure(module: nn.Module, fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn(module, x)`` as a function of parameters, other variables and input, with the updates as
    auxiliary output."""

    def pure(params: Any, rest: Any, x: Any) -> Any:
        return nn.apply(fn, module, mutable=["batch_stats"])({**params, **rest}, x)

    return pure


def _lifted(module: nn.Module, transform: Callable[..., Any]) -> Callable[..., Any]:
    """``transform(bound module, x)`` and the updates, as a function of variables and input."""

    def inside(variables: Any, x: Any) -> Any:
        return nn.apply(transform, module, mutable=["batch_stats"])(variables, x)

    return inside


def _vector(mdl: nn.Module, x: jax.Array) -> jax.Array:
    return mdl(x).reshape(-1)[:2]


def _case(name: str) -> tuple[nn.Module, Any, jax.Array]:
    module, shape = MODELS[name]
    x = normal(*shape)
    return module, initialized(module, x), x


@pytest.mark.parametrize("name", MODELS)
def test_grad_of_parameters_and_input(name: str) -> None:
    module, variables, x = _case(name)

    def raw(variables: Any, x: Any) -> Any:
        params, rest = _split(variables)
        grads, updates = jax.grad(_pure(module, total), argnums=(0, 2), has_aux=True)(
            params, rest, x
        )
        return grads, updates

    actual = _lifted(module, lambda mdl, x: lifted.grad(total, mdl, x, grad_variables="params"))
    assert_same_program(actual, raw, variables, x)


@pytest.mark.parametrize("name", SMALL)
def test_value_and_grad_of_the_input_alone(name: str) -> None:
    module, variables, x = _case(name)

    def raw(variables: Any, x: Any) -> Any:
        (y, updates), grad = jax.value_and_grad(_pure(module, total), argnums=2, has_aux=True)(
            *_split(variables), x
        )
        return (y, grad), updates

    actual = _lifted(module, lambda mdl, x: lifted.value_and_grad(total, mdl, x))
    assert_same_program(actual, raw, variables, x)


@pytest.mark.parametrize("name", MODELS)
def test_vjp(name: str) -> None:
    module, variables, x = _case(name)

    def raw(variables: Any, x: Any) -> Any:
        params, rest = _split(variables)
        pure = lambda params, x: _pure(module, _vector)(params, rest, x)  # noqa: E731
        y, bwd, updates = jax.vjp(pure, params, x, has_aux=True)
        return (y, bwd(y)), updates

    def actual(mdl: Any, x: Any) -> Any:
        y, bwd = lifted.vjp(_vector, mdl, x)
        return y, bwd(y)

    assert_same_program(_lifted(module, actual), raw, variables, x)


@pytest.mark.parametrize("name", MODELS)
def test_jvp_along_parameters_and_input(name: str) -> None:
    module, variables, x = _case(name)
    t_params, t_x = normal_like(_split(variables)[0]), normal_like(x)

    def raw(variables: Any, x: Any) -> Any:
        params, rest = _split(variables)
        pure = lambda params, x: _pure(module, _vector)(params, rest, x)  # noqa: E731
        y, t_y, updates = jax.jvp(pure, (params, x), (t_params, t_x), has_aux=True)
        return (y, t_y), updates

    actual = _lifted(module, lambda mdl, x: lifted.jvp(_vector, mdl, (x,), (t_x,), t_params))
    assert_same_program(actual, raw, variables, x)


@pytest.mark.parametrize("name", SMALL)
def test_jvp_along_one_leaf_does_not_touch_the_others(name: str) -> None:
    module, variables, x = _case(name)
    leaves, treedef = jax.tree.flatten(variables["params"])
    one = jnp.ones_like(leaves[0])
    tangents = treedef.unflatten([one] + [None] * (len(leaves) - 1))

    def raw(variables: Any, x: Any) -> Any:
        leaves = jax.tree.leaves(variables["params"])

        def pure(leaf: Any) -> Any:
            params = {"params": treedef.unflatten([leaf, *leaves[1:]])}
            return _pure(module, _vector)(params, _split(variables)[1], x)

        y, t_y, updates = jax.jvp(pure, (leaves[0],), (one,), has_aux=True)
        return (y, t_y), updates

    actual = _lifted(
        module, lambda mdl, x: lifted.jvp(_vector, mdl, (x,), (None,), {"params": tangents})
    )
    assert_same_program(actual, raw, variables, x)


@pytest.mark.parametrize("name", SMALL)
def test_linearize(name: str) -> None:
    module, variables, x = _case(name)
    t_params, t_x = normal_like(_split(variables)[0]), normal_like(x)

    def raw(variables: Any, x: Any) -> Any:
        params, rest = _split(variables)
        pure = lambda params, x: _pure(module, _vector)(params, rest, x)  # noqa: E731
        y, f_jvp, updates = jax.linearize(pure, params, x, has_aux=True)
        return (y, f_jvp(t_params, t_x)), updates

    def actual(mdl: Any, x: Any) -> Any:
        y, f_jvp = lifted.linearize(_vector, mdl, x, grad_variables="params")
        return y, f_jvp(t_params, t_x)

    assert_same_program(_lifted(module, actual), raw, variables, x)


@pytest.mark.parametrize("transform", ["jacfwd", "jacrev", "hessian"])
@pytest.mark.parametrize("name", ["mlp", "small_encoder", "batch_norm", "scanned"])
def test_jacobians(name: str, transform: str) -> None:
    module, variables, x = _case(name)

    def raw(variables: Any, x: Any) -> Any:
        pure = _pure(module, _vector)
        return getattr(jax, transform)(pure, argnums=2, has_aux=True)(*_split(variables), x)

    actual = _lifted(module, lambda mdl, x: getattr(lifted, transform)(_vector, mdl, x)[0])
    assert_same_program(actual, raw, variables, x)


@pytest.mark.parametrize("name", ["mlp", "small_encoder", "batch_norm", "boxed"])
def test_hvp(name: str) -> None:
    module, variables, x = _case(name)
    t_x = normal_like(x)

    def raw(variables: Any, x: Any) -> Any:
        grad = jax.grad(_pure(module, total), argnums=2, has_aux=True)
        along = lambda x: grad(*_split(variables), x)  # noqa: E731
        _, product, updates = jax.jvp(along, (x,), (t_x,), has_aux=True)
        return product, updates

    actual = _lifted(module, lambda mdl, x: lifted.hvp(total, mdl, (x,), (t_x,)))
    assert_same_program(actual, raw, variables, x)


@pytest.mark.parametrize("name", ["mlp", "small_encoder", "batch_norm"])
def test_grad_of_a_scope(name: str) -> None:
    module, variables, x = _case(name)

    def actual(variables: Any, x: Any) -> Any:
        scope = Scope(variables, mutable=["batch_stats"])
        fn = lambda scope, x: total(module.clone(parent=scope), x)  # noqa: E731
        grads = lifted.grad(fn, scope, x, grad_variables="params")
        return grads, dict(scope.mutable_variables())

    def raw(variables: Any, x: Any) -> Any:
        params, rest = _split(variables)
        return jax.grad(_pure(module, total), argnums=(0, 2), has_aux=True)(params, rest, x)

    assert_same_program(actual, raw, variables, x)


def test_a_transform_on_a_submodule_inside_a_model() -> None:
    class Model(nn.Module):
        transform: Callable[..., Any]

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.Dense(2)(x)
            return nn.Dense(2)(self.transform(models.MLP(name="inner"), x))

    def raw(mdl: nn.Module, x: jax.Array) -> jax.Array:
        if mdl.is_initializing():
            return mdl(x)
        params = mdl.variables
        return jax.grad(lambda x: total(models.MLP().bind(params), x))(x)

    def actual(mdl: nn.Module, x: jax.Array) -> jax.Array:
        return lifted.grad(total, mdl, x)[0]

    x = normal(4)
    variables = initialized(Model(raw), x)
    assert_same_program(Model(actual).apply, Model(raw).apply, variables, x)

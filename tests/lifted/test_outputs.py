"""Dtypes and kinds of inputs and outputs: whatever raw JAX takes, with its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lifted
from tests.helpers import assert_trees_equal, call, initialized, normal, total
from tests.lifted import models

X = normal(4, 3)
BOUND = models.MLP().bind(initialized(models.MLP(), X))


def _weak(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.typeof(x).weak_type, tree)


@pytest.mark.parametrize("value", [2.0, np.float32(2.0), jnp.float32(2.0)], ids=lambda v: type(v))
def test_the_output_is_a_python_scalar(value: Any) -> None:
    y, (grad,) = lifted.value_and_grad(lambda mdl, x: value, BOUND, X)
    assert float(y) == 2.0
    assert_trees_equal(grad, jnp.zeros_like(X))


def test_python_scalars_as_primals_keep_weak_types() -> None:
    fn = lambda mdl, a, b: jnp.sin(a) * b  # noqa: E731
    actual = lifted.value_and_grad(fn, BOUND, 0.5, 2.0)
    expected = jax.value_and_grad(lambda a, b: fn(None, a, b), argnums=(0, 1))(0.5, 2.0)
    assert_trees_equal(actual, expected)
    assert _weak(actual) == _weak(expected)


def test_python_scalars_as_tangents_keep_weak_types() -> None:
    fn = lambda mdl, a: jnp.sin(a) * 2  # noqa: E731
    actual = lifted.jvp(fn, BOUND, (0.5,), (1.0,), {})
    expected = jax.jvp(lambda a: fn(None, a), (0.5,), (1.0,))
    assert _weak(actual) == _weak(expected)


def test_a_python_tangent_of_a_bfloat16_scalar() -> None:
    _, dot = lifted.jvp(lambda mdl, a: a * a, BOUND, (jnp.bfloat16(3.0),), (1.0,), {})
    assert_trees_equal(dot, jnp.bfloat16(6.0))


def test_an_integer_python_tangent() -> None:
    _, dot = lifted.jvp(lambda mdl, a: a * a, BOUND, (3.0,), (1,), {})
    assert float(dot) == 6.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype: Any) -> None:
    module = nn.Dense(2, dtype=dtype, param_dtype=dtype)
    x = X.astype(dtype)
    variables = initialized(module, x)
    grads = lifted.grad(total, module.bind(variables), x, grad_variables="params")
    expected = jax.grad(lambda v, x: total(module.bind(v), x), argnums=(0, 1))(variables, x)
    assert_trees_equal(grads, expected)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}


def test_float64() -> None:
    with jax.enable_x64(True):
        module = nn.Dense(2, param_dtype=jnp.float64)
        x = normal(4, 3, dtype=jnp.float64)
        variables = initialized(module, x)
        _, dot = lifted.jvp(call, module.bind(variables), (x,), (x,), {})
        assert dot.dtype == jnp.float64


def test_a_float32_tangent_of_a_float64_value() -> None:
    with jax.enable_x64(True):
        module = nn.Dense(2, param_dtype=jnp.float64)
        x = normal(4, 3, dtype=jnp.float64)
        bound = module.bind(initialized(module, x))
        with pytest.raises(TypeError, match=r"tangents/0: .*float64\[4,3\], got float32\[4,3\]"):
            lifted.jvp(call, bound, (x,), (x.astype(jnp.float32),), {})


COMPLEX = nn.Dense(2, dtype=jnp.complex64, param_dtype=jnp.complex64)
Z = normal(3, dtype=jnp.complex64)


def _holomorphic(mdl: nn.Module, z: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(mdl(z)))


@pytest.mark.parametrize("name", ["grad", "jacfwd", "jacrev", "hessian"])
def test_holomorphic_functions(name: str) -> None:
    variables = initialized(COMPLEX, Z)
    bound = COMPLEX.bind(variables)
    (actual,) = getattr(lifted, name)(_holomorphic, bound, Z, holomorphic=True)
    actual = actual[0] if name == "hessian" else actual
    raw = getattr(jax, name)(lambda z: _holomorphic(bound, z), holomorphic=True)
    assert_trees_equal(actual, raw(Z))


def test_complex_parameters_of_a_real_function() -> None:
    variables = initialized(COMPLEX, Z)
    fn = lambda mdl, z: jnp.sum(jnp.abs(mdl(z)) ** 2)  # noqa: E731
    grads, z_grad = lifted.grad(fn, COMPLEX.bind(variables), Z, grad_variables="params")
    expected = jax.grad(lambda v, z: fn(COMPLEX.bind(v), z), argnums=(0, 1))(variables, Z)
    assert_trees_equal((grads, z_grad), expected)


OUTPUTS: dict[str, Callable[..., Any]] = {
    "pytree": lambda mdl, x: {"y": mdl(x), "pair": (x, 2.0)},
    "integer": lambda mdl, x: (mdl(x), jnp.argmax(x)),
    "boolean": lambda mdl, x: (mdl(x), x > 0),
    "key": lambda mdl, x: (mdl(x), jax.random.key(0)),
    "none": lambda mdl, x: (mdl(x), None),
    "empty": lambda mdl, x: (),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_jvp(name: str) -> None:
    fn = OUTPUTS[name]
    actual = lifted.jvp(fn, BOUND, (X,), (X,), {})
    expected = jax.jvp(lambda x: fn(BOUND, x), (X,), (X,))
    assert_trees_equal(actual, expected)


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_vjp(name: str) -> None:
    fn = OUTPUTS[name]
    y, bwd = lifted.vjp(fn, BOUND, X)
    expected_y, expected_bwd = jax.vjp(lambda x: fn(BOUND, x), X)
    ones = jax.tree.map(
        lambda y: jnp.ones_like(y) if jnp.issubdtype(jnp.asarray(y).dtype, jnp.inexact) else None,
        {k: v for k, v in enumerate(jax.tree.leaves(y))},
    )
    assert_trees_equal(y, expected_y)
    zeros = jax.tree.map(
        lambda y, one: np.zeros(jnp.shape(y), jax.dtypes.float0) if one is None else one,
        jax.tree.leaves(y),
        list(ones.values()),
    )
    treedef = jax.tree.structure(y)
    (expected,) = expected_bwd(treedef.unflatten(zeros))
    assert_trees_equal(bwd(treedef.unflatten(list(ones.values())))[1], expected)


HELD: dict[str, Any] = {
    "int": 3,
    "bool": True,
    "int32": jnp.arange(3),
    "uint8": np.arange(3, dtype=np.uint8),
    "key": jax.random.key(0),
    "keys": jax.random.split(jax.random.key(0), 3),
    "raw key": jax.random.PRNGKey(0),
    "none": None,
    "mixed": {"n": 3, "none": None},
}


@pytest.mark.parametrize("name", HELD)
def test_primals_that_cannot_be_differentiated(name: str) -> None:
    fn = lambda mdl, x, held: jnp.sum(mdl(x))  # noqa: E731
    x_grad, held_grad = lifted.grad(fn, BOUND, X, HELD[name])
    assert_trees_equal(x_grad, lifted.grad(total_of, BOUND, X)[0])
    assert jax.tree.structure(held_grad) == jax.tree.structure(HELD[name])
    for got, value in zip(jax.tree.leaves(held_grad), jax.tree.leaves(HELD[name]), strict=True):
        assert (got.dtype, got.shape) == (jax.dtypes.float0, jnp.shape(value))


def total_of(mdl: nn.Module, x: jax.Array) -> jax.Array:
    return jnp.sum(mdl(x))


@pytest.mark.parametrize("name", HELD)
def test_primals_that_cannot_be_differentiated_need_no_tangent(name: str) -> None:
    fn = lambda mdl, x, held: mdl(x)  # noqa: E731
    expected = lifted.jvp(call, BOUND, (X,), (X,), {})
    assert_trees_equal(lifted.jvp(fn, BOUND, (X, HELD[name]), (X, None), {}), expected)


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("transform", ["jacfwd", "jacrev", "hessian"])
def test_jacobians_with_inputs_that_cannot_be_differentiated(transform: str, name: str) -> None:
    fn = lambda mdl, x, held: mdl(x)[0]  # noqa: E731
    jacobian = getattr(lifted, transform)(fn, BOUND, X, HELD[name])
    plain = getattr(lifted, transform)(lambda mdl, x: mdl(x)[0], BOUND, X)
    assert_trees_equal(jacobian[0] if transform != "hessian" else jacobian[0][:1], plain[0])


@pytest.mark.parametrize("zero", [0, np.int32(0), jnp.int32(0), np.zeros((), jax.dtypes.float0)])
def test_a_zero_tangent_of_an_integer_is_zero(zero: Any) -> None:
    fn = lambda mdl, x, n: mdl(x) * n  # noqa: E731
    expected = lifted.jvp(fn, BOUND, (X, 3), (X, None), {})
    assert_trees_equal(lifted.jvp(fn, BOUND, (X, 3), (X, zero), {}), expected)


@pytest.mark.parametrize("transform", ["grad", "vjp", "linearize", "jacrev"])
def test_variables_that_cannot_be_differentiated(transform: str) -> None:
    module = models.Counter()
    bound = module.bind(module.init(jax.random.key(0), X))
    if transform == "vjp":
        grads = lifted.vjp(total_of, bound, X, vjp_variables="state")[1](1.0)[0]
    elif transform == "linearize":
        zero = lifted.linearize(total_of, bound, X, grad_variables="state")[1]({}, None)
        assert zero == 0
        return
    else:
        grads, _ = getattr(lifted, transform)(total_of, bound, X, grad_variables="state")
    dtypes = {name: g.dtype for name, g in grads["state"].items()}
    assert dtypes.pop("mean") == jnp.float32
    assert set(dtypes.values()) == {jax.dtypes.float0}


def test_argnums_select_primals() -> None:
    fn = lambda mdl, a, b, c: jnp.sum(mdl(a)) * b * c  # noqa: E731
    everything = lifted.grad(fn, BOUND, X, 2.0, 3.0)
    assert_trees_equal(lifted.grad(fn, BOUND, X, 2.0, 3.0, argnums=(2, 0)), everything[::-2])
    assert_trees_equal(lifted.grad(fn, BOUND, X, 2.0, 3.0, argnums=-1), everything[2])


def test_argnums_with_variables() -> None:
    fn = lambda mdl, a, b: jnp.sum(mdl(a)) * b  # noqa: E731
    grads, b_grad = lifted.grad(fn, BOUND, X, 2.0, argnums=1, grad_variables="params")
    everything = lifted.grad(fn, BOUND, X, 2.0, grad_variables="params")
    assert_trees_equal((grads, b_grad), (everything[0], everything[2]))


def test_no_primals() -> None:
    fn = lambda mdl: total_of(mdl, X)  # noqa: E731
    (grads,) = lifted.grad(fn, BOUND, grad_variables="params")
    assert_trees_equal(grads, lifted.grad(total_of, BOUND, X, grad_variables="params")[0])


def test_the_pullback_may_leave_jit() -> None:
    y, bwd = jax.jit(lambda x: lifted.vjp(call, BOUND, x))(X)
    _, expected = lifted.vjp(call, BOUND, X)
    from tests.helpers import assert_trees_close

    assert_trees_close(bwd(y), expected(y))


def test_the_linear_map_may_leave_jit() -> None:
    y, f_jvp = jax.jit(lambda x: lifted.linearize(call, BOUND, x))(X)
    assert f_jvp(X).shape == y.shape


def test_an_empty_array() -> None:
    (grad,) = lifted.grad(total_of, BOUND, jnp.zeros((0, 3)))
    assert grad.shape == (0, 3)


def test_numpy_arrays() -> None:
    assert_trees_equal(lifted.grad(total_of, BOUND, np.asarray(X)), lifted.grad(total_of, BOUND, X))

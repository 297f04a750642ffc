"""Bad input: one error of ours each, with the path, what was expected, what came, and a remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lifted
from tests.helpers import call, initialized, normal, total
from tests.lifted import models
from tests.lifted.calls import CALLS, every_transform

X = normal(4, 3)
MODULE = models.Norm(train=False)
BOUND = MODULE.bind(initialized(MODULE, X))


# What every transform checks.


@every_transform
def test_an_unbound_module(transform: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"mdl: Norm is not bound.*mdl\.bind\(variables"):
        transform(total, MODULE)


@every_transform
def test_an_unbound_module_in_a_pytree(transform: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="mdl: MLP is not bound"):
        transform(lambda mdls, x: total(mdls[0], x), (BOUND, models.MLP()))


@every_transform
def test_a_class_for_an_instance(transform: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"mdl: .*got <class .*Norm'>.*Make an instance.*Norm\("):
        transform(total, models.Norm)


@pytest.mark.parametrize("mdl", [None, (), {}], ids=repr)
def test_no_module_at_all(mdl: Any) -> None:
    with pytest.raises(TypeError, match="mdl: expected a module.*which has none"):
        lifted.grad(total, mdl, X)


@pytest.mark.parametrize("mdl", [3.0, X, "dense", (BOUND, 3.0)], ids=["float", "array", "str", "3"])
def test_something_that_is_no_module(mdl: Any) -> None:
    with pytest.raises(TypeError, match=r"mdl: expected a bound Linen module.*got (float32|str)"):
        lifted.grad(total, mdl, X)


@every_transform
def test_fn_is_not_callable(transform: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="fn must be callable, got str"):
        transform("loss", BOUND)


@every_transform
def test_fn_is_a_module(transform: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="fn is a module.*lambda mdl, x: mdl"):
        transform(BOUND, BOUND)


@every_transform
def test_fn_is_a_module_class(transform: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="fn is the class MLP"):
        transform(models.MLP, BOUND)


@every_transform
def test_mdl_and_fn_are_swapped(transform: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="mdl: expected a bound Linen module.*got function"):
        transform(BOUND, total)


def test_a_module_among_the_primals() -> None:
    with pytest.raises(TypeError, match="grad: primal 1 holds a module.*Put it into mdl"):
        lifted.grad(total, BOUND, X, BOUND)


def test_fn_returns_a_module() -> None:
    with pytest.raises(TypeError, match="vjp: fn returned a module or a scope"):
        lifted.vjp(lambda mdl, x: mdl, BOUND, X)


WITH_AUX: dict[str, Callable[..., Any]] = {
    "grad": lambda fn: lifted.grad(fn, BOUND, X, has_aux=True),
    "value_and_grad": lambda fn: lifted.value_and_grad(fn, BOUND, X, has_aux=True),
    "vjp": lambda fn: lifted.vjp(fn, BOUND, X, has_aux=True),
    "jvp": lambda fn: lifted.jvp(fn, BOUND, (X,), (X,), {}, has_aux=True),
    "linearize": lambda fn: lifted.linearize(fn, BOUND, X, has_aux=True),
    "jacfwd": lambda fn: lifted.jacfwd(fn, BOUND, X, has_aux=True),
    "jacrev": lambda fn: lifted.jacrev(fn, BOUND, X, has_aux=True),
    "hessian": lambda fn: lifted.hessian(fn, BOUND, X, has_aux=True),
    "hvp": lambda fn: lifted.hvp(fn, BOUND, (X,), (X,), has_aux=True),
}


@pytest.mark.parametrize("name", WITH_AUX)
def test_has_aux_without_a_pair(name: str) -> None:
    message = rf"{name}: with has_aux=True fn must return a pair \(output, aux\), got float32\[\]"
    with pytest.raises(TypeError, match=message):
        WITH_AUX[name](total)


@pytest.mark.parametrize("name", WITH_AUX)
def test_has_aux_with_three_values(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: with has_aux=True .* got 3 values"):
        WITH_AUX[name](lambda mdl, x: (total(mdl, x), 1, 2))


# Outputs of `grad`.


@pytest.mark.parametrize("name", ["grad", "value_and_grad", "hvp"])
def test_an_output_that_is_not_scalar(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: .*scalar, got float32\[4,2\].*jacrev"):
        CALLS[name](call, BOUND)


@pytest.mark.parametrize("name", ["grad", "value_and_grad", "hvp"])
@pytest.mark.parametrize("output", [None, (1.0,), {"loss": 1.0}, (1.0, 2.0)], ids=repr)
def test_an_output_that_is_a_pytree(name: str, output: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}: fn must return a scalar, got PyTreeDef"):
        CALLS[name](lambda mdl, x: output, BOUND)


@pytest.mark.parametrize("output", [1, True, jnp.int32(3)], ids=repr)
def test_an_output_that_is_an_integer(output: Any) -> None:
    with pytest.raises(TypeError, match=r"grad: fn must return a real scalar, got (int|bool)"):
        lifted.grad(lambda mdl, x: output, BOUND, X)


def test_an_output_that_is_a_string() -> None:
    with pytest.raises(TypeError, match="grad: fn must return a .*scalar, got str"):
        lifted.grad(lambda mdl, x: "loss", BOUND, X)


def test_a_complex_output_without_holomorphic() -> None:
    with pytest.raises(TypeError, match=r"real scalar, got complex64\[\].*holomorphic=True"):
        lifted.grad(lambda mdl, x: total(mdl, x) * 1j, BOUND, X)


def test_a_real_output_with_holomorphic() -> None:
    with pytest.raises(TypeError, match=r"grad: fn must return a complex scalar, got float32\[\]"):
        lifted.grad(lambda mdl, x: total(mdl, x.real), BOUND, X.astype(complex), holomorphic=True)


def test_a_real_input_with_holomorphic() -> None:
    with pytest.raises(
        TypeError, match=r"grad: primals/0: expected a complex input, got float32\[4,3\]; leave"
    ):
        lifted.grad(total, BOUND, X, holomorphic=True)


def test_the_backward_pass_of_a_vector_is_not_traced() -> None:
    traced = []

    @jax.custom_vjp
    def watched(x: jax.Array) -> jax.Array:
        return x

    watched.defvjp(lambda x: (x, None), lambda _, t: traced.append(t) or (t,))
    with pytest.raises(ValueError, match="must return a scalar"):
        lifted.grad(lambda mdl, x: watched(mdl(x)), BOUND, X)
    assert not traced


# Primals and tangents.

"""Bad filters, argnums and axes; inputs and outputs that cannot be differentiated."""

from __future__ import annotations

from typing import Any

import jax
import pytest

import lifted
from tests.helpers import initialized, normal, total
from tests.lifted import models
from tests.lifted.calls import CALLS

X = normal(4, 3)
MODULE = models.Norm(train=False)
BOUND = MODULE.bind(initialized(MODULE, X))


SELECTING = {
    "grad": lambda f: lifted.grad(total, BOUND, X, grad_variables=f),
    "vjp": lambda f: lifted.vjp(total, BOUND, X, vjp_variables=f),
    "linearize": lambda f: lifted.linearize(total, BOUND, X, grad_variables=f),
    "jacrev": lambda f: lifted.jacrev(total, BOUND, X, grad_variables=f),
    "hvp": lambda f: lifted.hvp(total, BOUND, (X,), (X,), grad_variables=f),
}


@pytest.mark.parametrize("name", SELECTING)
def test_a_filter_that_selects_nothing(name: str) -> None:
    message = rf"{name}: (grad|vjp)_variables='param' selects no .*did you mean 'params'\?"
    with pytest.raises(ValueError, match=message):
        SELECTING[name]("param")


@pytest.mark.parametrize("name", SELECTING)
def test_a_predicate_that_selects_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*selects no variable of mdl.*known: batch_st"):
        SELECTING[name](lambda path, x: False)


@pytest.mark.parametrize("name", SELECTING)
def test_a_filter_of_another_type(name: str) -> None:
    with pytest.raises(TypeError, match="filter: expected a bool, the name of a collection.*got 3"):
        SELECTING[name](3)


@pytest.mark.parametrize("argument", ["variables", "rngs"])
def test_a_visibility_filter_of_another_type(argument: str) -> None:
    with pytest.raises(TypeError, match="filter: expected a bool, the name of a collection.*got 3"):
        lifted.grad(total, BOUND, X, **{argument: 3})


def test_nothing_to_differentiate() -> None:
    with pytest.raises(ValueError, match="grad: nothing to differentiate.*grad_variables='params'"):
        lifted.grad(lambda mdl: total(mdl, X), BOUND)


def test_only_integers_to_differentiate() -> None:
    """As in JAX this is an error only where nothing has a gradient at all."""
    (gradient,) = lifted.grad(lambda mdl, n: total(mdl, X), BOUND, 3)
    assert gradient.dtype == jax.dtypes.float0


@pytest.mark.parametrize("argnums", [1, -2, (0, 1)], ids=repr)
def test_argnums_out_of_range(argnums: Any) -> None:
    with pytest.raises(ValueError, match=r"grad: argnums=.*there are 1 primals, counted from 0"):
        lifted.grad(total, BOUND, X, argnums=argnums)


@pytest.mark.parametrize("argnums", ["x", (0, "x"), 1.0, True], ids=repr)
def test_argnums_of_another_type(argnums: Any) -> None:
    with pytest.raises(TypeError, match="grad: argnums: expected an int or a sequence of them"):
        lifted.grad(total, BOUND, X, argnums=argnums)


def test_reduce_axes_that_is_a_string() -> None:
    with pytest.raises(TypeError, match=r"grad: reduce_axes: .*got 'batch'; write \('batch',\)"):
        lifted.grad(total, BOUND, X, reduce_axes="batch")


def test_reduce_axes_that_are_not_mapped() -> None:
    message = r"grad: reduce_axes=\('batch',\): no axis 'batch' is mapped.*axis_name='batch'"
    with pytest.raises(ValueError, match=message):
        lifted.grad(total, BOUND, X, reduce_axes=("batch",))


def test_a_primal_that_is_no_array() -> None:
    """It is held, as JAX holds what it does not differentiate."""
    x_grad, name_grad = lifted.grad(lambda mdl, x, name: total(mdl, x), BOUND, X, "name")
    assert x_grad.shape == X.shape
    assert name_grad.dtype == jax.dtypes.float0


def test_an_output_that_is_no_array() -> None:
    with pytest.raises(TypeError, match=r"jvp: fn must return arrays, got str at output\[1\]"):
        lifted.jvp(lambda mdl, x: (mdl(x), "name"), BOUND, (X,), (X,), {})


@pytest.mark.parametrize("name", ["vjp", "jvp", "linearize", "jacfwd", "jacrev", "hessian"])
def test_an_output_that_is_no_array_in_each_transform(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}: fn must return arrays, got str"):
        CALLS[name](lambda mdl, x: "name", BOUND)


def test_jacfwd_of_complex_input() -> None:
    with pytest.raises(
        TypeError, match=r"jacfwd: primals/0: expected a real input, got complex64\[4,3\]; for"
    ):
        lifted.jacfwd(total, BOUND, X.astype(complex))

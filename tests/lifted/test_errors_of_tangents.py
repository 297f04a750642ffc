"""Bad tangents and cotangents: the error names the path, what was expected, what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lifted
from tests.helpers import call, initialized, normal, total
from tests.lifted import models

X = normal(4, 3)
MODULE = models.Norm(train=False)
BOUND = MODULE.bind(initialized(MODULE, X))


@pytest.mark.parametrize("transform", [lifted.jvp, lifted.hvp])
def test_primals_that_are_no_sequence(transform: Callable[..., Any]) -> None:
    message = r"primals: expected a tuple or a list.*got float32\[4,3\].*\(primal,\)"
    with pytest.raises(TypeError, match=message):
        transform(total, BOUND, X, (X,), {})


@pytest.mark.parametrize("transform", [lifted.jvp, lifted.hvp])
def test_tangents_that_are_no_sequence(transform: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"tangents: expected a tuple or a list.*\(tangent,\)"):
        transform(total, BOUND, (X,), X, {})


@pytest.mark.parametrize("transform", [lifted.jvp, lifted.hvp])
def test_numbers_of_primals_and_tangents_differ(transform: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="tangents: expected one for each of 1 primals, got 2"):
        transform(total, BOUND, (X,), (X, X), {})


KERNEL = jnp.ones((3, 3))


def _nested(path: str, value: Any) -> Any:
    for key in reversed(path.split("/")):
        value = {key: value}
    return value


BAD_VARIABLE_TANGENTS: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown collection": (
        _nested("param/Dense_0/kernel", KERNEL),
        ValueError,
        r"variable_tangents/param: .*no such variable; did you mean 'params'\?",
    ),
    "unknown path": (
        _nested("params/Dense_0/kernal", KERNEL),
        ValueError,
        r"variable_tangents/params/Dense_0/kernal: .*did you mean 'kernel'\? \(known: bias, kernel",
    ),
    "unknown submodule": (
        _nested("params/Dense_7/kernel", KERNEL),
        ValueError,
        r"variable_tangents/params/Dense_7: .*did you mean 'Dense_[01]'",
    ),
    "the parameters without their collection": (
        _nested("Dense_0/kernel", KERNEL),
        ValueError,
        r"variable_tangents/Dense_0: .*known: batch_stats, params",
    ),
    "shape": (
        _nested("params/Dense_0/kernel", KERNEL.T[:2]),
        ValueError,
        r"params/Dense_0/kernel: .*shape of its value, float32\[3,3\], got float32\[2,3\]",
    ),
    "shape that would broadcast": (
        _nested("params/Dense_0/kernel", 1.0),
        ValueError,
        r"params/Dense_0/kernel: .*float32\[3,3\], got float32\[\]",
    ),
    "dtype": (
        _nested("params/Dense_0/kernel", KERNEL.astype(jnp.bfloat16)),
        TypeError,
        r"params/Dense_0/kernel: .*float32\[3,3\], got bfloat16\[3,3\].*astype\('float32'\)",
    ),
    "an array for a collection": (
        {"params": KERNEL},
        TypeError,
        r"variable_tangents/params: expected a dictionary with .*'Dense_0'.*got float32\[3,3\]",
    ),
    "a dictionary for an array": (
        _nested("params/Dense_0/kernel", {"value": KERNEL}),
        TypeError,
        r"params/Dense_0/kernel: expected a tangent of type float32\[3,3\], got PyTreeDef",
    ),
    "an array for everything": (
        KERNEL,
        TypeError,
        r"variable_tangents: expected a dictionary .*'params'.*got float32\[3,3\]",
    ),
    "something that is no array": (
        _nested("params/Dense_0/kernel", "ones"),
        TypeError,
        r"params/Dense_0/kernel: expected .*float32\[3,3\], got str",
    ),
}


@pytest.mark.parametrize("case", BAD_VARIABLE_TANGENTS)
@pytest.mark.parametrize("name", ["jvp", "hvp"])
def test_a_bad_tangent_of_a_variable(name: str, case: str) -> None:
    tangents, error, message = BAD_VARIABLE_TANGENTS[case]
    with pytest.raises(error, match=message):
        getattr(lifted, name)(total, BOUND, (X,), (X,), tangents)


@pytest.mark.parametrize("case", BAD_VARIABLE_TANGENTS)
def test_a_bad_tangent_for_linearize(case: str) -> None:
    tangents, error, message = BAD_VARIABLE_TANGENTS[case]
    _, f_jvp = lifted.linearize(call, BOUND, X, grad_variables=["params", "batch_stats"])
    with pytest.raises(error, match=message):
        f_jvp(tangents, X)


BAD_TANGENTS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "shape": (X, X[0], ValueError, r"tangents/0: .*float32\[4,3\], got float32\[3\]"),
    "dtype": (X, X.astype(jnp.bfloat16), TypeError, r"tangents/0: .*float32\[4,3\], got bfloat16"),
    "complex": (X, X * 1j, TypeError, r"tangents/0: .*float32\[4,3\], got complex64"),
    "integer": (X, jnp.ones((4, 3), int), TypeError, r"tangents/0: .*float32\[4,3\], got int32"),
    "structure": (X, (X,), TypeError, r"tangents/0: expected a tangent of type float32\[4,3\]"),
    "key": ({"a": X}, {"b": X}, ValueError, "tangents/0/b: .*did you mean|tangents/0/b: .*known"),
    "list for tuple": ((X, X), [X, X], TypeError, "tangents/0: expected a tangent of the struct"),
    "length": ((X, X), (X,), TypeError, "tangents/0: expected a tangent of the structure"),
    "array for a tuple": ((X, X), X, TypeError, "tangents/0: expected a tangent of the structure"),
    "boolean": (1.0, True, TypeError, r"tangents/0: .*float32\[\], got bool"),
    "of an integer": (3, 1.0, TypeError, r"tangents/0: int32\[\] cannot be differentiated.*None"),
    "of a boolean": (True, 1.0, TypeError, r"tangents/0: bool\[\] cannot be differentiated"),
    "of a key": (
        jax.random.key(0),
        1.0,
        TypeError,
        r"tangents/0: key<fry>\[\] cannot be differentiated",
    ),
    "of a raw key": (
        jax.random.PRNGKey(0),
        np.ones(2, np.float32),
        TypeError,
        r"tangents/0: uint32\[2\] cannot be differentiated",
    ),
}


@pytest.mark.parametrize("case", BAD_TANGENTS)
def test_a_bad_tangent_of_a_primal(case: str) -> None:
    primal, tangent, error, message = BAD_TANGENTS[case]
    with pytest.raises(error, match=message):
        lifted.jvp(lambda mdl, p: mdl(X), BOUND, (primal,), (tangent,), {})


def test_tangents_for_a_pytree_of_modules_without_its_structure() -> None:
    message = "variable_tangents: expected the structure of mdl, .*None where all are zero"
    with pytest.raises(TypeError, match=message):
        lifted.jvp(lambda m, x: m[0](x), (BOUND, BOUND), (X,), (X,), {"params": {}})


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_tangents_for_linearize(count: int) -> None:
    _, f_jvp = lifted.linearize(call, BOUND, X, grad_variables="params")
    message = rf"f_jvp\(variable_tangents, \*tangents\): expected 2 arguments, got {count}"
    with pytest.raises(TypeError, match=message):
        f_jvp(*[None] * count)


# Cotangents.


def _vjp(fn: Callable[..., Any], cotangent: Any) -> Any:
    return lifted.vjp(fn, BOUND, X)[1](cotangent)


def test_a_cotangent_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"cotangent: .*float32\[4,2\], got float32\[2\]"):
        _vjp(call, jnp.ones(2))


def test_a_cotangent_of_another_dtype() -> None:
    with pytest.raises(TypeError, match=r"cotangent: .*float32\[4,2\], got bfloat16\[4,2\]"):
        _vjp(call, jnp.ones((4, 2), jnp.bfloat16))


def test_a_cotangent_of_another_structure() -> None:
    with pytest.raises(TypeError, match="cotangent: expected a cotangent of the structure"):
        _vjp(lambda mdl, x: (mdl(x), x), X)


def test_a_cotangent_of_an_integer() -> None:
    with pytest.raises(TypeError, match=r"cotangent/1: int32\[\] cannot be diff"):
        _vjp(lambda mdl, x: (mdl(x), 3), (jnp.ones((4, 2)), 1.0))


def test_no_cotangent() -> None:
    with pytest.raises(TypeError, match=r"bwd\(cotangent\): expected 1 argument, .* got 0"):
        lifted.vjp(call, BOUND, X)[1]()


# What is asked for.

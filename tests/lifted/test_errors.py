"""Bad input: one error of ours each, with the path, what was expected, what came, and a remedy."""

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

# Each transform as a function of (fn, mdl); the rest of its arguments is right.
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda fn, mdl: lifted.grad(fn, mdl, X),
    "value_and_grad": lambda fn, mdl: lifted.value_and_grad(fn, mdl, X),
    "vjp": lambda fn, mdl: lifted.vjp(fn, mdl, X),
    "jvp": lambda fn, mdl: lifted.jvp(fn, mdl, (X,), (X,), {}),
    "linearize": lambda fn, mdl: lifted.linearize(fn, mdl, X),
    "jacfwd": lambda fn, mdl: lifted.jacfwd(fn, mdl, X),
    "jacrev": lambda fn, mdl: lifted.jacrev(fn, mdl, X),
    "hessian": lambda fn, mdl: lifted.hessian(fn, mdl, X),
    "hvp": lambda fn, mdl: lifted.hvp(fn, mdl, (X,), (X,)),
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


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
        TRANSFORMS[name](call, BOUND)


@pytest.mark.parametrize("name", ["grad", "value_and_grad", "hvp"])
@pytest.mark.parametrize("output", [None, (1.0,), {"loss": 1.0}, (1.0, 2.0)], ids=repr)
def test_an_output_that_is_a_pytree(name: str, output: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}: fn must return a scalar, got PyTreeDef"):
        TRANSFORMS[name](lambda mdl, x: output, BOUND)


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
        TRANSFORMS[name](lambda mdl, x: "name", BOUND)


def test_jacfwd_of_complex_input() -> None:
    with pytest.raises(
        TypeError, match=r"jacfwd: primals/0: expected a real input, got complex64\[4,3\]; for"
    ):
        lifted.jacfwd(total, BOUND, X.astype(complex))

"""Bad input with NNX modules: one error of ours each, in the words of NNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax
import jax.numpy as jnp
import pytest
from flax import nnx

import lifted
from tests.helpers import call, normal, total
from tests.lifted.calls import CALLS, every_transform
from tests.nnx_bridge import models

X = normal(4, 3)
KERNEL = jnp.ones((3, 3))
NORM = models.make(models.Norm)
COUNTER = models.make(models.Counter)


@every_transform
def test_a_class_for_an_instance(transform: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"mdl: .*NNX module.*got <class .*Norm'>.*Make .* Norm\("):
        transform(total, models.Norm)


@every_transform
def test_fn_is_a_module(transform: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="fn is a module.*lambda mdl, x: mdl"):
        transform(NORM, NORM)


@every_transform
def test_mdl_and_fn_are_swapped(transform: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="mdl: expected .*an NNX module.*got function"):
        transform(NORM, total)


@pytest.mark.parametrize("primal", [NORM, nnx.Param(1.0), [NORM]], ids=["module", "Param", "list"])
def test_a_module_or_a_variable_among_the_primals(primal: Any) -> None:
    with pytest.raises(
        TypeError, match="grad: primal 1 holds a module, a scope or a Variable.*Put"
    ):
        lifted.grad(total, NORM, X, primal)


@every_transform
def test_fn_returns_a_module(transform: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="fn returned a module"):
        transform(lambda mdl, x: mdl, NORM)


@pytest.mark.parametrize("name", ["grad", "value_and_grad", "hvp"])
def test_an_output_that_is_not_scalar(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: .*scalar, got float32\[4,2\].*jacrev"):
        CALLS[name](call, NORM)


def _linen(*path: str, value: Any = KERNEL) -> Any:
    for key in reversed(path):
        value = {key: value}
    return value


def _state(*path: str, value: Any = KERNEL) -> nnx.State:
    return nnx.State(_linen(*path, value=nnx.Param(value)))


HALF = KERNEL.astype(jnp.bfloat16)
SHAPE = r"float32\[3,3\], got float32\[2,3\]"
DTYPE = r"float32\[3,3\], got bfloat16\[3,3\].*astype\('float32'\)"
BAD_TANGENTS: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown collection": (
        _linen("param", "dense", "kernel"),
        ValueError,
        "variable_tangents/param/dense/kernel: .*no such Variable; did you mean 'params/dense/ker",
    ),
    "unknown name": (
        _linen("params", "dense", "kernal"),
        ValueError,
        "params/dense/kernal: .*no such Variable; did you mean 'params/dense/kernel'",
    ),
    "unknown submodule": (
        _linen("params", "dens", "kernel"),
        ValueError,
        r"params/dens/kernel: .*did you mean 'params/dense/kernel'\? \(known: batch_stats/norm/me",
    ),
    "unknown name in a state": (
        _state("dense", "kernal"),
        ValueError,
        r"variable_tangents/dense/kernal: .*did you mean 'kernel'\? \(known: bias, kernel\)",
    ),
    "unknown submodule in a state": (
        _state("dens", "kernel"),
        ValueError,
        r"variable_tangents/dens: .*did you mean 'dense'\? \(known: dense, norm, out\)",
    ),
    "shape": (_linen("params", "dense", "kernel", value=KERNEL[:2]), ValueError, SHAPE),
    "shape in a state": (
        _state("dense", "kernel", value=KERNEL[:2]),
        ValueError,
        rf"variable_tangents/dense/kernel: .*{SHAPE}",
    ),
    "dtype": (_linen("params", "dense", "kernel", value=HALF), TypeError, DTYPE),
    "dtype in a state": (
        _state("dense", "kernel", value=HALF),
        TypeError,
        rf"variable_tangents/dense/kernel: .*{DTYPE}",
    ),
    "an array for everything": (
        KERNEL,
        TypeError,
        r"variable_tangents: expected a dictionary .* 'dense', 'norm', 'out' .*got float32\[3,3\]",
    ),
    "an array for a collection": (
        {"params": KERNEL},
        ValueError,
        "variable_tangents/params: .*no such Variable; .*params/dense/kernel",
    ),
    "a dictionary for an array": (
        _linen("params", "dense", "kernel", "value"),
        ValueError,
        "params/dense/kernel/value: .*did you mean 'params/dense/kernel'",
    ),
    "something that is no array": (
        _linen("params", "dense", "kernel", value="ones"),
        TypeError,
        r"variable_tangents/dense/kernel: expected .*float32\[3,3\], got str",
    ),
    "another module": (
        models.make(models.MLP),
        ValueError,
        "MLP is given as tangents of a module, but it has no dense/bias; did you mean 'second/b",
    ),
}


@pytest.mark.parametrize("case", BAD_TANGENTS)
@pytest.mark.parametrize("name", ["jvp", "hvp"])
def test_a_bad_tangent_of_a_variable(name: str, case: str) -> None:
    tangents, error, message = BAD_TANGENTS[case]
    with pytest.raises(error, match=message):
        getattr(lifted, name)(total, NORM, (X,), (X,), tangents)


@pytest.mark.parametrize("case", BAD_TANGENTS)
def test_a_bad_tangent_for_linearize(case: str) -> None:
    tangents, error, message = BAD_TANGENTS[case]
    _, f_jvp = lifted.linearize(call, NORM, X, grad_variables=True)
    with pytest.raises(error, match=message):
        f_jvp(tangents, X)


@pytest.mark.parametrize("name", ["count", "flag", "key"])
@pytest.mark.parametrize("form", ["dict", "state"])
def test_a_tangent_of_what_cannot_be_differentiated(form: str, name: str) -> None:
    one = models.Count(1.0)
    tangents = nnx.State({name: one}) if form == "state" else {"Count": {name: 1.0}}
    message = rf"variable_tangents/{name}: .* cannot be differentiated.*leave it out, or give None"
    with pytest.raises(TypeError, match=message):
        lifted.jvp(call, COUNTER, (X,), (X,), tangents)


def test_a_tangent_of_an_rng_count() -> None:
    count = nnx.RngCount(1.0, tag="default")
    tangents = nnx.State({"drop": {"rngs": {"count": count}}})
    with pytest.raises(TypeError, match=r"drop/rngs/count: uint32\[\] cannot be differentiated"):
        lifted.jvp(call, models.make(models.Noisy), (X,), (X,), tangents)


def test_a_tangent_of_a_bare_variable() -> None:
    with pytest.raises(ValueError, match=r"variable_tangents: .*float32\[3\], got float32\[2\]"):
        lifted.jvp(lambda v, x: v[...] * x, nnx.Param(X[0]), (X,), (X,), nnx.Param(X[0, :2]))


def test_tangents_for_a_pytree_of_modules_without_its_structure() -> None:
    message = "variable_tangents: expected the structure of mdl, .*None where all are zero"
    with pytest.raises(TypeError, match=message):
        lifted.jvp(lambda m, x: m[0](x), (NORM, COUNTER), (X,), (X,), {"params": {}})


FILTERS: dict[str, tuple[Any, str]] = {
    "a misspelt collection": ("param", "did you mean 'params'"),
    "a type": (nnx.Cache, "known: BatchStat, Param, batch_stats, params"),
    "a type of nearly that name": (type("Params", (nnx.Variable,), {}), "did you mean 'Param'"),
    "a path": (nnx.PathContains("dens"), "known: BatchStat, Param, batch_stats, params"),
    "a predicate": (lambda path, x: False, "known: BatchStat, Param, batch_stats, params"),
    "several": (("param", nnx.Cache), "known: BatchStat, Param, batch_stats, params"),
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_that_selects_nothing(name: str) -> None:
    selected, message = FILTERS[name]
    with pytest.raises(ValueError, match=rf"grad: grad_variables=.*selects no .*{message}"):
        lifted.grad(total, NORM, X, grad_variables=selected)


@pytest.mark.parametrize("argument", ["grad_variables", "variables", "rngs"])
@pytest.mark.parametrize("filter", [3, 2.5, object()], ids=["int", "float", "object"])
def test_a_filter_of_another_type(argument: str, filter: Any) -> None:
    mdl = models.make(models.Noisy)
    with pytest.raises(TypeError, match="filter: expected a bool, .*a Variable type such as nnx.P"):
        lifted.grad(total, mdl, X, **{argument: filter})


def test_a_variable_that_a_filter_hides_is_named() -> None:
    with pytest.raises(AttributeError, match="no attribute 'mean'") as error:
        lifted.grad(total, NORM, X, variables="params")
    assert any("rngs of the transform leave out norm/mean" in n for n in error.value.__notes__)


def test_a_write_to_a_module_that_fn_closes_over() -> None:
    other = models.make(models.Norm)
    with pytest.raises(flax.errors.TraceContextError, match="different trace level") as error:
        lifted.grad(lambda mdl, x: total(other, x), NORM, X)
    assert any("Put that module into mdl" in note for note in error.value.__notes__)


def test_a_real_variable_of_a_holomorphic_function() -> None:
    with pytest.raises(TypeError, match=r"grad: variables/dense/bias: expected a complex input, g"):
        lifted.grad(
            total,
            models.make(models.Norm),
            X + 0j,
            grad_variables="params",
            holomorphic=True,
        )

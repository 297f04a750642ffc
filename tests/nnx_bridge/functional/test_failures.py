"""A transform that fails leaves the NNX module as it was: its objects, its values, its traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax
import jax
import pytest
from flax import nnx

import lifted
from tests.helpers import assert_trees_equal, call, normal, total
from tests.lifted.transforms import every_transform
from tests.nnx_bridge import models

X = normal(4, 3)


def _failing(mdl: Any, x: jax.Array) -> Any:
    mdl(x)
    mdl.extra = nnx.Param(x)
    mdl.first.calls = 1
    del mdl.first.bias
    raise RuntimeError("as planned")


class Everything(nnx.Module):
    """Writes statistics, draws, and counts."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.norm(self.first(x)))


FAILURES: dict[str, Callable[[Any], Any]] = {
    "fn in grad": lambda mdl: lifted.grad(_failing, mdl, X, grad_variables=nnx.Param),
    "fn in vjp": lambda mdl: lifted.vjp(_failing, mdl, X),
    "fn in jvp": lambda mdl: lifted.jvp(_failing, mdl, (X,), (X,), {}),
    "fn in linearize": lambda mdl: lifted.linearize(_failing, mdl, X),
    "fn in jacfwd": lambda mdl: lifted.jacfwd(_failing, mdl, X),
    "fn in hessian": lambda mdl: lifted.hessian(_failing, mdl, X),
    "fn in hvp": lambda mdl: lifted.hvp(_failing, mdl, (X,), (X,)),
    "fn in a nested transform": lambda mdl: lifted.jvp(
        lambda m, x: lifted.grad(_failing, m, x), mdl, (X,), (X,), {}
    ),
    "a vector in grad": lambda mdl: lifted.grad(call, mdl, X),
    "a bad tangent": lambda mdl: lifted.jvp(call, mdl, (X,), (X[0],), {}),
    "a bad tangent of a variable": lambda mdl: lifted.jvp(
        call, mdl, (X,), (X,), {"params": {"first": {"kernel": X}}}
    ),
    "a bad output": lambda mdl: lifted.vjp(lambda m, x: (m(x), "text"), mdl, X),
    "no pair": lambda mdl: lifted.vjp(call, mdl, X, has_aux=True),
    "rngs left out": lambda mdl: lifted.grad(total, mdl, X, rngs=False),
    "variables left out": lambda mdl: lifted.grad(total, mdl, X, variables="params"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_call_leaves_the_module_as_it_was(name: str) -> None:
    mdl, twin = models.make(Everything), models.make(Everything)
    attributes = [(node, dict(vars(node))) for _, node in nnx.iter_modules(mdl)]
    values = [v.get_raw_value() for _, v in nnx.iter_graph(mdl) if isinstance(v, nnx.Variable)]
    with jax.checking_leaks(), pytest.raises((RuntimeError, ValueError, TypeError, AttributeError)):
        FAILURES[name](mdl)
    assert [node for _, node in nnx.iter_modules(mdl)] == [node for node, _ in attributes]
    for node, before in attributes:
        assert vars(node).keys() == before.keys()
        assert all(vars(node)[k] is before[k] for k in before)
    after = [v.get_raw_value() for _, v in nnx.iter_graph(mdl) if isinstance(v, nnx.Variable)]
    assert all(a is b for a, b in zip(after, values, strict=True))
    assert_trees_equal(mdl(X), twin(X))  # It can still be called and written.


@every_transform
def test_what_the_module_wrote_before_the_failure_is_kept(transform: Callable[..., Any]) -> None:
    mdl = models.make(Everything)
    mdl(X)
    with pytest.raises(TypeError):
        lifted.grad(lambda mdl, x: "text", mdl, X)
    transform(mdl, X)
    assert mdl.drop.rngs.count[...] == 2


def test_a_closed_over_module_of_another_trace_is_not_half_written() -> None:
    mdl = models.make(Everything)
    values = jax.tree.leaves(nnx.state(mdl))

    def inside(x: jax.Array) -> jax.Array:
        return lifted.jvp(call, mdl, (x,), (x,), {})[1].sum()

    with pytest.raises(flax.errors.TraceContextError, match="different trace level"):
        jax.grad(inside)(X)
    assert all(a is b for a, b in zip(jax.tree.leaves(nnx.state(mdl)), values, strict=True))


def test_of_two_modules_neither_is_written_where_one_belongs_to_another_trace() -> None:
    outer, seen = models.make(Everything), []

    def inside(x: jax.Array) -> jax.Array:
        own = models.make(Everything)
        fn = lambda mdls, x: mdls[0](x) + mdls[1](x)  # noqa: E731
        try:
            lifted.jvp(fn, (own, outer), (x,), (x,), None)
        finally:
            seen.append(own.drop.rngs.count.get_raw_value())
        return x.sum()

    with pytest.raises(flax.errors.TraceContextError, match="different trace level"):
        jax.grad(inside)(X)
    assert seen == [0]

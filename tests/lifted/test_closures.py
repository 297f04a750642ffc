"""`fn` closes over modules that are not in `mdl`: reading them is fine, writing is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import lifted
from tests.helpers import assert_trees_close, assert_trees_equal, initialized, normal, strict, total
from tests.lifted import models

X = normal(4, 3)


class Model(nn.Module):
    """Differentiates one submodule while `fn` closes over another."""

    other: nn.Module
    use: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        return self.use(lambda mdl, x: total(mdl, x) * total(self.other, x), models.MLP(), x)


USES: dict[str, Callable[..., Any]] = {
    "grad": lambda fn, mdl, x: lifted.grad(fn, mdl, x),
    "jvp": lambda fn, mdl, x: lifted.jvp(fn, mdl, (x,), (x,), {}),
    "jacfwd": lambda fn, mdl, x: lifted.jacfwd(fn, mdl, x),
    "jacrev": lambda fn, mdl, x: lifted.jacrev(fn, mdl, x),
    "hvp": lambda fn, mdl, x: lifted.hvp(fn, mdl, (x,), (x,)),
    "linearize": lambda fn, mdl, x: lifted.linearize(fn, mdl, x),
}


def _plain(fn: Callable[..., Any], mdl: Any, x: jax.Array) -> Any:
    return fn(mdl, x)


def test_a_module_that_is_only_read() -> None:
    variables = initialized(Model(models.MLP(), _plain), X)
    with strict():
        (actual,) = Model(models.MLP(), USES["grad"]).apply(variables, X)
    expected = jax.grad(lambda x: Model(models.MLP(), _plain).apply(variables, x))(X)
    assert_trees_close(actual, expected)


@pytest.mark.parametrize("name", USES)
def test_statistics_of_a_module_that_is_not_in_mdl(name: str) -> None:
    variables = initialized(Model(models.Norm(), _plain), X)
    message = rf"{name}: fn wrote batch_stats/other/.* closes over.*lifted\.{name}\(fn, \(mdl, oth"
    with pytest.raises(ValueError, match=message):
        Model(models.Norm(), USES[name]).apply(variables, X, mutable=["batch_stats"])


def test_what_is_sown_by_a_module_that_is_not_in_mdl() -> None:
    variables = initialized(Model(models.Sower(), _plain), X)
    with pytest.raises(ValueError, match="grad: fn wrote intermediates/other/hidden"):
        Model(models.Sower(), USES["grad"]).apply(variables, X, mutable=["intermediates"])


def test_the_error_leaves_no_tracer_behind() -> None:
    def caught(fn: Callable[..., Any], mdl: Any, x: jax.Array) -> Any:
        with pytest.raises(ValueError, match="fn wrote"):
            lifted.grad(fn, mdl, x)

    variables = initialized(Model(models.Norm(), _plain), X)
    module = Model(models.Norm(), caught)
    _, updates = module.apply(variables, X, mutable=["batch_stats", "intermediates"])
    assert_trees_equal(updates, {"batch_stats": variables["batch_stats"]})


def test_the_caller_itself_sows_in_fn() -> None:
    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            def fn(mdl: nn.Module, x: jax.Array) -> jax.Array:
                self.sow("intermediates", "x", x)
                return total(mdl, x)

            return lifted.grad(fn, models.MLP(), x)

    variables = initialized(Sows(), X)
    with pytest.raises(ValueError, match="fn wrote intermediates/x"):
        Sows().apply(variables, X, mutable=["intermediates"])


def test_a_write_that_has_nothing_to_do_with_the_transform() -> None:
    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            def fn(mdl: nn.Module, y: jax.Array) -> jax.Array:
                self.sow("intermediates", "x", x)
                return total(mdl, y)

            return lifted.grad(fn, models.MLP(), 2 * x)

    variables = initialized(Sows(), X)
    apply = jax.jit(lambda v, x: Sows().apply(v, x, mutable=["intermediates"])[1])
    with strict():
        assert_trees_equal(apply(variables, X), {"intermediates": {"x": (X,)}})


def test_parameters_of_a_closed_over_module_are_created() -> None:
    plain = Model(models.Norm(), _plain).init(jax.random.key(0), X)
    variables = Model(models.Norm(), USES["grad"]).init(jax.random.key(0), X)
    assert_trees_equal(variables, plain)
    in_jit = jax.jit(Model(models.Norm(), USES["hvp"]).init)(jax.random.key(0), X)
    assert_trees_close(in_jit, plain)


def test_a_closure_in_a_nested_transform() -> None:
    def nested(fn: Callable[..., Any], mdl: Any, x: jax.Array) -> Any:
        inner = lambda mdl, x: jnp.sum(lifted.grad(fn, mdl, x)[0])  # noqa: E731
        return lifted.grad(inner, mdl, x)

    variables = initialized(Model(models.Norm(), _plain), X)
    with pytest.raises(ValueError, match="grad: fn wrote batch_stats/other"):
        Model(models.Norm(), nested).apply(variables, X, mutable=["batch_stats"])


def test_a_module_in_mdl_may_write() -> None:

    class Remedied(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            fn = lambda mdls, x: total(mdls[0], x) * total(mdls[1], x)  # noqa: E731
            return lifted.grad(fn, (models.MLP(), models.Norm(name="other")), x)

    variables = initialized(Remedied(), X)
    _, updates = Remedied().apply(variables, X, mutable=["batch_stats"])
    _, plain = models.Norm().apply(
        {c: v["other"] for c, v in variables.items()}, X, mutable=["batch_stats"]
    )
    assert_trees_close(updates["batch_stats"]["other"], plain["batch_stats"])

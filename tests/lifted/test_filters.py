"""The filters `variables` and `rngs`: what they leave out is not visible inside."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.core import DenyList
from flax.errors import InvalidRngError, ModifyScopeVariableError

import lifted
from tests.helpers import assert_trees_equal, call, initialized, normal, total
from tests.lifted import models

X = normal(4, 3)


def _seen(mdl: nn.Module, x: jax.Array) -> Any:
    return jnp.sum(x), sorted(mdl.variables)


@pytest.mark.parametrize(
    ("variables", "seen"),
    [
        (True, ["batch_stats", "params"]),
        (False, []),
        ("params", ["params"]),
        (["params"], ["params"]),
        (("params", "batch_stats"), ["batch_stats", "params"]),
        ({"batch_stats"}, ["batch_stats"]),
        (DenyList("params"), ["batch_stats"]),
        ([], []),
        ("cache", []),
    ],
    ids=repr,
)
def test_the_visible_collections(variables: Any, seen: list[str]) -> None:
    bound = models.Norm().bind(initialized(models.Norm(), X))
    _, actual = lifted.grad(_seen, bound, X, variables=variables, has_aux=True)
    assert actual == seen


def test_what_is_differentiated_is_visible_too() -> None:
    bound = models.MLP().bind(initialized(models.MLP(), X))
    grads, _ = lifted.grad(total, bound, X, variables=False, grad_variables="params")
    expected, _ = lifted.grad(total, bound, X, grad_variables="params")
    assert_trees_equal(grads, expected)


def test_what_a_predicate_selects_is_visible_too() -> None:
    bound = models.MLP().bind(initialized(models.MLP(), X))
    is_kernel = lambda path, x: path[-1] == "kernel"  # noqa: E731
    grads, _ = lifted.grad(total, bound, X, variables=False, grad_variables=is_kernel)
    assert jax.tree.leaves(jax.tree.map(jnp.shape, grads, is_leaf=jnp.isscalar))
    assert {k: set(v) for k, v in grads["params"].items()} == {
        "Dense_0": {"kernel"},
        "Dense_1": {"kernel"},
    }


def test_what_has_a_tangent_is_visible_too() -> None:
    bound = models.MLP().bind(initialized(models.MLP(), X))
    tangents = {"params": {"Dense_0": {"bias": jnp.ones(3)}}}
    actual = lifted.jvp(call, bound, (X,), (None,), tangents, variables=False)
    assert_trees_equal(actual, lifted.jvp(call, bound, (X,), (None,), tangents))


def test_what_is_only_differentiated_cannot_be_written() -> None:
    def writes(mdl: nn.Module, x: jax.Array) -> jax.Array:
        mdl.put_variable("params", "extra", x)
        return x.sum()

    def transform(mdl: nn.Module, x: jax.Array) -> Any:
        return lifted.grad(writes, mdl, x, variables=False, grad_variables="params")

    with pytest.raises(ModifyScopeVariableError, match="params"):
        nn.apply(transform, models.MLP(), mutable=["params"])(initialized(models.MLP(), X), X)


def test_a_list_of_names_and_predicates() -> None:
    bound = models.Norm(train=False).bind(initialized(models.Norm(), X))
    is_mean = lambda path, x: path[-1] == "mean"  # noqa: E731
    grads, _ = lifted.grad(total, bound, X, grad_variables=["params", is_mean])
    assert set(grads) == {"params", "batch_stats"}
    assert set(grads["batch_stats"]["BatchNorm_0"]) == {"mean"}


def test_gradients_of_several_collections() -> None:
    module = models.Norm(train=False)
    variables = initialized(module, X)
    grads, _ = lifted.grad(total, module.bind(variables), X, grad_variables=True)
    expected = jax.grad(lambda v: total(module.bind(v), X))(variables)
    assert_trees_equal(grads, expected)


def test_gradients_of_a_denylist() -> None:
    bound = models.Norm(train=False).bind(initialized(models.Norm(), X))
    grads, _ = lifted.grad(total, bound, X, grad_variables=DenyList("params"))
    assert set(grads) == {"batch_stats"}


@pytest.mark.parametrize("rngs", [False, "params", [], DenyList("dropout")], ids=repr)
def test_a_stream_that_is_left_out_is_missing(rngs: Any) -> None:
    module = models.Noisy()
    bound = module.bind(initialized(module, X), rngs={"dropout": jax.random.key(1)})
    with pytest.raises(InvalidRngError, match="dropout"):
        lifted.grad(total, bound, X, rngs=rngs)


@pytest.mark.parametrize("rngs", [True, "dropout", ["dropout"], DenyList("params")], ids=repr)
def test_a_stream_that_is_visible_gives_the_draws_of_a_plain_call(rngs: Any) -> None:
    module = models.Noisy()
    bind = lambda: module.bind(  # noqa: E731
        initialized(module, X), rngs={"dropout": jax.random.key(1)}
    )
    y, _ = lifted.value_and_grad(total, bind(), X, rngs=rngs)
    assert_trees_equal(y, total(bind(), X))


def test_draws_go_on_after_the_transform() -> None:
    module = models.Noisy()
    bind = lambda: module.bind(  # noqa: E731
        initialized(module, X), rngs={"dropout": jax.random.key(1)}
    )
    plain, ours = bind(), bind()
    total(plain, X)
    lifted.grad(total, ours, X)
    assert_trees_equal(ours(X), plain(X))


def test_a_collection_that_is_left_out_is_kept() -> None:
    module = models.Counter()
    variables = initialized(module, X)

    def transform(mdl: nn.Module, x: jax.Array) -> Any:
        return lifted.grad(lambda m, x: x.sum(), mdl, x, variables="params")

    _, updates = nn.apply(transform, module, mutable=["state"])(variables, X)
    assert_trees_equal(updates["state"], variables["state"])


def test_draws_of_a_submodule_go_on_after_many_transforms() -> None:
    """The counters of a submodule stand below a key that is an object of Flax's own."""

    class Twin(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return models.Noisy(name="inner")(x)

    module = Twin()
    variables = initialized(module, X)
    bind = lambda: module.bind(variables, rngs={"dropout": jax.random.key(1)})  # noqa: E731
    plain, ours = bind(), bind()
    for _ in range(3):
        plain(X)
        lifted.grad(total, ours, X)
    assert ours.scope.rng_counters == plain.scope.rng_counters
    assert_trees_equal(ours(X), plain(X))

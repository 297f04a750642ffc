"""What `fn` writes reaches the caller once, with primal values; nothing does when it raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import lifted
from tests.helpers import assert_trees_close, assert_trees_equal, call, initialized, normal, strict
from tests.helpers import total as _total
from tests.lifted import models
from tests.lifted.transforms import every_transform

X = normal(4, 3)


WRITERS: dict[str, tuple[nn.Module, list[str]]] = {
    "batch_norm": (models.Norm(), ["batch_stats"]),
    "sow": (models.Sower(), ["intermediates"]),
    "state": (models.Counter(), ["state"]),
}


def _apply(fn: Callable[..., Any], module: nn.Module, variables: Any, mutable: Any) -> Any:
    return nn.apply(fn, module, mutable=mutable)(variables, X)


@every_transform
@pytest.mark.parametrize("writer", WRITERS)
def test_the_writes_are_those_of_a_plain_call(writer: str, transform: Callable[..., Any]) -> None:
    module, mutable = WRITERS[writer]
    variables = initialized(module, X)
    with strict():
        _, plain = _apply(call, module, variables, mutable)
        _, updates = _apply(transform, module, variables, mutable)
    # Under a transform XLA compiles what an eager call runs one by one.
    assert_trees_close(updates, plain)


@every_transform
def test_the_writes_are_primal_values(transform: Callable[..., Any]) -> None:
    module, mutable = WRITERS["batch_norm"]
    _, updates = _apply(transform, module, initialized(module, X), mutable)
    assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(updates))


def test_two_calls_write_twice() -> None:
    def twice(mdl: nn.Module, x: jax.Array) -> Any:
        lifted.grad(_total, mdl, x)
        lifted.jvp(call, mdl, (x,), (x,), {})

    def plain(mdl: nn.Module, x: jax.Array) -> Any:
        mdl(x), mdl(x)

    module, mutable = models.Counter(), ["state"]
    variables = initialized(module, X)
    _, updates = _apply(twice, module, variables, mutable)
    _, expected = _apply(plain, module, variables, mutable)
    assert_trees_equal(updates, expected)


def test_what_is_sown_twice_is_appended() -> None:
    def twice(mdl: nn.Module, x: jax.Array) -> Any:
        mdl(x)
        lifted.grad(_total, mdl, x)

    module = models.Sower()
    _, updates = _apply(twice, module, initialized(module, X), ["intermediates"])
    assert len(updates["intermediates"]["hidden"]) == 2


def test_a_cache_is_created_and_filled() -> None:
    module = nn.MultiHeadDotProductAttention(num_heads=1, decode=True)
    variables = module.init(jax.random.key(0), X[None])
    step = lambda mdl, x: mdl(x, x)  # noqa: E731
    one = X[None, :1]
    _, plain = nn.apply(step, module, mutable=["cache"])(variables, one)
    grads = lambda mdl, x: lifted.grad(lambda m, x: m(x, x).sum(), mdl, x)  # noqa: E731
    _, updates = nn.apply(grads, module, mutable=["cache"])(variables, one)
    assert updates["cache"]["cache_index"] == 1
    assert_trees_close(updates, plain)


def test_perturbations_pass_through() -> None:
    class Perturbed(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.sin(self.perturb("point", nn.Dense(2)(x))).sum()

    module = Perturbed()
    variables = initialized(module, X)
    bound = module.bind(variables)
    grads, x_grad = lifted.grad(call, bound, X, grad_variables="perturbations")
    expected = jax.grad(lambda p: module.apply({**variables, "perturbations": p}, X))(
        variables["perturbations"]
    )
    assert_trees_equal(grads, {"perturbations": expected})


@pytest.mark.parametrize("value", [None, {}, (), {"a": {}}], ids=repr)
def test_variables_without_arrays_are_created(value: Any) -> None:
    class Empty(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            self.variable("state", "empty", lambda: value)
            return x.sum()

    transform = nn.init(lambda mdl, x: lifted.grad(call, mdl, x), Empty())
    assert transform(jax.random.key(0), X) == nn.init(call, Empty())(jax.random.key(0), X)


def test_a_variable_that_is_a_dictionary_is_written_as_by_a_plain_call() -> None:
    class Nested(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            v = self.variable("state", "tree", lambda: {"a": jnp.float32(1), "b": jnp.float32(2)})
            v.value = {"a": v.value["a"] + x.sum(), "b": v.value["b"]}
            return x.sum() * v.value["a"]

    variables = nn.init(call, Nested())(jax.random.key(0), X)
    _, plain = _apply(call, Nested(), variables, ["state"])
    _, updates = _apply(lambda mdl, x: lifted.grad(call, mdl, x), Nested(), variables, ["state"])
    assert_trees_equal(updates, plain)


def test_a_variable_that_is_no_array_passes_through() -> None:
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            name = self.variable("state", "name", lambda: "first")
            name.value = "second"
            return x.sum()

    transform = lambda mdl, x: lifted.grad(call, mdl, x)  # noqa: E731
    _, updates = _apply(transform, Named(), {"state": {"name": "first"}}, ["state"])
    assert updates == {"state": {"name": "second"}}


class _Fails(nn.Module):
    """Writes, draws, makes a submodule, and then raises."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        models.Counter(name="inner")(x)
        self.make_rng("dropout")
        self.sow("intermediates", "x", x)
        raise RuntimeError("on purpose")


def _fails_in_fn(mdl: nn.Module, x: jax.Array) -> Any:
    return lifted.grad(call, mdl, x)


def _fails_after_fn(mdl: nn.Module, x: jax.Array) -> Any:
    def vector(mdl: nn.Module, x: jax.Array) -> Any:
        try:
            return mdl(x)
        except RuntimeError:
            return x

    return lifted.grad(vector, mdl, x)


@pytest.mark.parametrize("transform", [_fails_in_fn, _fails_after_fn])
def test_nothing_is_written_when_the_transform_fails(transform: Callable[..., Any]) -> None:
    def caught(mdl: nn.Module, x: jax.Array) -> Any:
        before = jax.tree.map(lambda x: x, dict(mdl.scope.mutable_variables()))
        key = mdl.scope.rng_counters.copy()
        with pytest.raises((RuntimeError, ValueError), match="on purpose|must return a scalar"):
            transform(mdl, x)
        assert mdl.scope.rng_counters == key
        assert_trees_equal(dict(mdl.scope.mutable_variables()), before)
        return mdl.make_rng("dropout")

    module = _Fails()
    rngs = {"dropout": jax.random.key(2), "params": jax.random.key(3)}
    variables = {"state": {}}
    drawn, _ = nn.apply(caught, module, mutable=True)(variables, X, rngs=rngs)
    fresh = nn.apply(lambda mdl: mdl.make_rng("dropout"), module)(variables, rngs=rngs)
    assert_trees_equal(drawn, fresh)


def test_nothing_can_be_written_where_the_caller_is_immutable() -> None:
    module = models.Norm()
    bound = module.bind(initialized(module, X))
    from flax.errors import ModifyScopeVariableError

    with pytest.raises(ModifyScopeVariableError, match="batch_stats"):
        lifted.grad(_total, bound, X)


def test_a_bound_module_outside_of_apply_is_written() -> None:
    module = models.Norm()
    variables = initialized(module, X)
    bound = module.bind(variables, mutable=["batch_stats"])
    lifted.grad(_total, bound, X)
    _, plain = _apply(call, module, variables, ["batch_stats"])
    assert_trees_close({"batch_stats": bound.variables["batch_stats"]}, plain)
    assert_trees_equal(bound.variables["params"], variables["params"])


def test_the_variables_of_the_caller_are_not_aliased() -> None:
    """The dictionaries given to `apply` are not written to."""
    module = models.Norm()
    variables = initialized(module, X)
    before = jax.tree.map(lambda x: x, variables)
    _apply(lambda mdl, x: lifted.grad(_total, mdl, x), module, variables, ["batch_stats"])
    assert_trees_equal(variables, before)

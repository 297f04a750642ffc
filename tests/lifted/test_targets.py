"""What a target may be: other methods, modules given as attributes, pytrees of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import lifted
from tests.helpers import (
    assert_trees_close,
    assert_trees_equal,
    call,
    initialized,
    normal,
    strict,
    total,
)
from tests.lifted import models
from tests.lifted.transforms import RNGS, input_gradient

X = normal(4, 3)


@pytest.mark.parametrize("module", [models.Shared(), models.Methods(), models.MLP()], ids=repr)
def test_gradients_of_variables(module: nn.Module) -> None:
    variables = initialized(module, X)
    grads = lifted.grad(total, module.bind(variables), X, grad_variables="params")
    expected = jax.grad(lambda v, x: total(module.bind(v), x), argnums=(0, 1))(variables, X)
    assert_trees_equal(grads, expected)


METHODS = models.Methods()
METHODS_VARIABLES = initialized(METHODS, X)
OTHER_METHODS: dict[str, Callable[..., Any]] = {
    "lambda": lambda bound: lambda mdl, x: mdl.encode(x),
    "bound": lambda bound: bound.encode,
    "of the class": lambda bound: models.Methods.encode,
    "of an unbound instance": lambda bound: METHODS.encode,
}


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_another_method(name: str) -> None:
    bound = METHODS.bind(METHODS_VARIABLES)
    actual = lifted.jvp(OTHER_METHODS[name](bound), bound, (X,), (X,), {})
    expected = jax.jvp(lambda x: METHODS.apply(METHODS_VARIABLES, x, method="encode"), (X,), (X,))
    assert_trees_equal(actual, expected)


def test_a_method_of_another_module_is_called_with_its_own_self() -> None:
    class Trainer(nn.Module):
        net: nn.Module
        scale: float = 3.0

        def loss(self, net: nn.Module, x: jax.Array) -> jax.Array:
            return self.scale * total(net, x)

        def __call__(self, x: jax.Array) -> Any:
            return lifted.grad(self.loss, self.net, x)[0]

    module = Trainer(models.MLP())
    variables = initialized(module, X)
    net = models.MLP().bind({"params": variables["params"]["net"]})
    expected = jax.grad(lambda x: 3.0 * total(net, x))(X)
    assert_trees_equal(module.apply(variables, X), expected)


def _with_foreign_modules(use: Callable[..., Any]) -> nn.Module:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            a, b = nn.Dense(2, name="a"), nn.Dense(2, name="b")
            return use(models.Holder(a, (b, a), name="holder"), x)

    return Model()


def test_gradients_of_modules_given_as_attributes() -> None:
    grads = lambda mdl, x: lifted.grad(total, mdl, x, grad_variables="params")  # noqa: E731
    module = _with_foreign_modules(grads)
    plain = _with_foreign_modules(total)
    variables = initialized(plain, X)
    actual, x_grad = module.apply(variables, X)
    expected, expected_x = jax.grad(plain.apply, argnums=(0, 1))(variables, X)
    assert set(actual["params"]) == {"Dense_0", "first", "others_0"}
    assert_trees_close(
        {
            "a": actual["params"]["first"],
            "b": actual["params"]["others_0"],
            "holder": {"Dense_0": actual["params"]["Dense_0"]},
        },
        expected["params"],
    )
    assert_trees_close(x_grad, expected_x)


def test_modules_given_as_attributes_are_initialised_where_they_belong() -> None:
    grads = lambda mdl, x: lifted.grad(total, mdl, x, grad_variables="params")  # noqa: E731
    (at_init, _), variables = _with_foreign_modules(grads).init_with_output(RNGS, X)
    assert_trees_equal(variables, _with_foreign_modules(total).init(RNGS, X))
    assert set(at_init["params"]) == {"Dense_0", "first", "others_0"}


def test_tangents_of_modules_given_as_attributes() -> None:
    ones = {"bias": jnp.ones(2)}
    use = lambda mdl, x: lifted.jvp(call, mdl, (x,), (None,), {"params": {"first": ones}})  # noqa: E731
    variables = initialized(_with_foreign_modules(total), X)
    _, dot = _with_foreign_modules(use).apply(variables, X)
    assert_trees_close(dot, jnp.full((4, 2), 2.0))  # `first` is called twice.


def test_multi_scope_lists_the_scopes_as_linen_does() -> None:
    def use(transform: Callable[..., Any]) -> Callable[..., Any]:
        return lambda mdl, x: transform(total, mdl, x, multi_scope=True)[1](jnp.float32(1))

    variables = initialized(_with_foreign_modules(total), X)
    ours = _with_foreign_modules(use(lifted.vjp)).apply(variables, X)
    linen = _with_foreign_modules(use(nn.vjp)).apply(variables, X)
    assert_trees_close(list(ours[0]), list(linen[0]))
    assert_trees_close(ours[1], linen[1])


def test_writes_of_modules_given_as_attributes() -> None:
    class Model(nn.Module):
        use: Callable[..., Any]

        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            return self.use(models.Holder(models.Norm(name="foreign")), x)

    variables = initialized(Model(total), X)
    _, plain = Model(total).apply(variables, X, mutable=["batch_stats"])
    with strict():
        _, updates = Model(input_gradient).apply(variables, X, mutable=["batch_stats"])
    assert_trees_close(updates, plain)


def test_attributes_whose_names_would_clash() -> None:
    """A list `a` and a field `a_0` give one name for two modules."""

    class Clash(nn.Module):
        a: tuple[nn.Module, ...]
        a_0: nn.Module

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return self.a[0](x) * self.a_0(x)

    class Model(nn.Module):
        use: Callable[..., Any]

        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            return self.use(Clash((nn.Dense(2, name="p"),), nn.Dense(2, name="q")), x)

    variables = initialized(Model(total), X)
    actual = Model(input_gradient).apply(variables, X)
    assert_trees_close(actual, jax.grad(lambda x: Model(total).apply(variables, x))(X))
    grads = Model(lambda m, x: lifted.grad(total, m, x, grad_variables="params")[0])
    expected = jax.grad(lambda v: Model(total).apply(v, X))(variables)
    leaves = lambda tree: sorted(float(x.sum()) for x in jax.tree.leaves(tree))  # noqa: E731
    assert leaves(grads.apply(variables, X)) == pytest.approx(leaves(expected), rel=1e-4)


class _Pair(nn.Module):
    use: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        return self.use({"a": models.Norm(name="a"), "b": [models.Shared(name="b")]}, x)


def _pair(mdls: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(mdls["a"](mdls["b"][0](x)) ** 2)


def test_a_pytree_of_modules() -> None:
    variables = initialized(_Pair(_pair), X)
    use = lambda m, x: lifted.grad(_pair, m, x, grad_variables="params")  # noqa: E731
    with strict():
        (grads, x_grad), updates = _Pair(use).apply(variables, X, mutable=["batch_stats"])
    plain = lambda v, x: _Pair(_pair).apply(v, x, mutable=["batch_stats"])  # noqa: E731
    expected, stats = jax.grad(plain, argnums=(0, 1), has_aux=True)(variables, X)
    assert_trees_close(grads["a"]["params"], expected[0]["params"]["a"])
    assert_trees_close(grads["b"][0]["params"], expected[0]["params"]["b"])
    assert_trees_close(x_grad, expected[1])
    assert_trees_close(updates, stats)


def test_the_same_module_twice() -> None:
    bound = models.MLP(out=3).bind(initialized(models.MLP(out=3), X))
    twice = lambda mdls, x: total(lambda x: mdls[1](mdls[0](x)), x)  # noqa: E731
    (grads, none), _ = lifted.grad(twice, (bound, bound), X, grad_variables="params")
    expected = lifted.grad(lambda m, x: twice((m, m), x), bound, X, grad_variables="params")[0]
    assert_trees_equal(grads, expected)
    assert none == {}


# Modules made in fn.

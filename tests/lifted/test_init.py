"""Inside `init` every transform creates what `fn` creates, and returns what it returns in
`apply`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import lifted
from tests.helpers import Inside, assert_trees_equal, call, normal, strict, total
from tests.lifted import models
from tests.lifted.transforms import RNGS, TRANSFORMS, every_transform

X = normal(4, 3)
MODELS = {
    "mlp": models.MLP(),
    "batch_norm": models.Norm(),
    "dropout": models.Noisy(),
    "boxed": models.Boxed(),
    "state": models.Counter(),
    "setup": models.Methods(),
    "scanned": models.Scanned(),
    "shared": models.Shared(),
}


@pytest.mark.parametrize(
    ("name", "transform"),
    [(name, TRANSFORMS["grad"]) for name in MODELS]
    + [("batch_norm", transform) for transform in TRANSFORMS.values()],
)
def test_the_variables_are_those_of_a_plain_call(name: str, transform: Callable[..., Any]) -> None:
    plain = Inside(MODELS[name], call).init(RNGS, X)
    variables = Inside(MODELS[name], transform).init(RNGS, X)
    assert_trees_equal(variables, plain)


def _structure(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@every_transform
@pytest.mark.parametrize("name", ["batch_norm", "boxed"])
def test_the_result_has_the_structure_that_it_has_in_apply(
    name: str, transform: Callable[..., Any]
) -> None:
    module = Inside(MODELS[name], transform)
    at_init, variables = module.init_with_output(RNGS, X)
    in_apply, _ = module.apply(variables, X, rngs=RNGS, mutable=["batch_stats"])
    at_init, in_apply = (jax.tree.leaves_with_path(r) for r in (at_init, in_apply))
    assert [(path, jnp.shape(x)) for path, x in at_init] == [
        (path, jnp.shape(x)) for path, x in in_apply
    ]


@pytest.mark.parametrize("inner", ["grad", "vjp", "jvp", "jacrev"])
@pytest.mark.parametrize("outer", ["grad", "jvp", "hvp"])
def test_nested_transforms(inner: str, outer: str) -> None:
    def first(mdl: nn.Module, x: jax.Array) -> jax.Array:
        return sum(jnp.sum(y**2) for y in jax.tree.leaves(TRANSFORMS[inner](mdl, x)))

    outers: dict[str, Callable[..., Any]] = {
        "grad": lambda mdl, x: lifted.grad(first, mdl, x, grad_variables="params"),
        "jvp": lambda mdl, x: lifted.jvp(first, mdl, (x,), (x,), {}),
        "hvp": lambda mdl, x: lifted.hvp(first, mdl, (x,), (x,), grad_variables="params"),
    }
    module = Inside(models.MLP(), outers[outer])
    result, variables = module.init_with_output(RNGS, X)
    assert_trees_equal(variables, Inside(models.MLP(), call).init(RNGS, X))
    assert jax.tree.structure(result) == jax.tree.structure(module.apply(variables, X))


def test_jvp_along_parameters_that_do_not_exist_yet() -> None:
    tangents = {"params": {"Dense_0": {"kernel": jnp.ones((3, 3))}}}
    use = lambda mdl, x: lifted.jvp(call, mdl, (x,), (None,), tangents)  # noqa: E731
    module = Inside(models.MLP(), use)
    at_init, variables = module.init_with_output(RNGS, X)
    assert_trees_equal(at_init, module.apply(variables, X))
    assert jnp.any(at_init[1] != 0)


def test_a_misspelt_tangent_is_told_once_the_parameters_exist() -> None:
    tangents = {"params": {"Dense_0": {"kernal": jnp.ones((3, 3))}}}
    use = lambda mdl, x: lifted.jvp(call, mdl, (x,), (None,), tangents)  # noqa: E731
    with pytest.raises(ValueError, match="params/Dense_0/kernal: .*did you mean 'kernel'"):
        Inside(models.MLP(), use).init(RNGS, X)


def test_a_filter_that_selects_nothing_is_told_once_the_variables_exist() -> None:
    use = lambda mdl, x: lifted.grad(total, mdl, x, grad_variables="parms")  # noqa: E731
    with pytest.raises(ValueError, match="grad_variables='parms' selects no .*mean 'params'"):
        Inside(models.MLP(), use).init(RNGS, X)


FILTERED: dict[str, Callable[..., Any]] = {
    "grad": lambda mdl, x: lifted.grad(total, mdl, x, variables=False, grad_variables="params"),
    "vjp": lambda mdl, x: lifted.vjp(total, mdl, x, variables="state")[1](1.0),
    "jvp": lambda mdl, x: lifted.jvp(
        call, mdl, (x,), (x,), {"params": {"Dense_0": {"bias": jnp.ones(3)}}}, variables=False
    ),
    "hvp": lambda mdl, x: lifted.hvp(
        total, mdl, (x,), (x,), variables=False, grad_variables="params"
    ),
}


@pytest.mark.parametrize("use", FILTERED.values(), ids=FILTERED)
def test_what_is_differentiated_is_created_though_variables_leaves_it_out(
    use: Callable[..., Any],
) -> None:
    module = Inside(models.MLP(), use)
    result, variables = module.init_with_output(RNGS, X)
    assert_trees_equal(variables, Inside(models.MLP(), call).init(RNGS, X))
    assert_trees_equal(result, module.apply(variables, X))


def test_abstract_initialisation() -> None:
    module = Inside(models.Norm(), TRANSFORMS["grad"])
    abstract = jax.eval_shape(module.init, RNGS, X)
    assert _structure(module.init(RNGS, X)) == _structure(abstract)


def test_initialisation_under_jit() -> None:
    module = Inside(models.Norm(), TRANSFORMS["hvp"])
    with strict():
        variables = jax.jit(module.init)(RNGS, X)
    assert jax.tree.structure(variables) == jax.tree.structure(module.init(RNGS, X))


def test_a_module_that_is_partly_initialised() -> None:
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            inner = models.MLP()
            inner(x)
            return lifted.grad(total, inner, x, grad_variables="params")

    (at_init, _), variables = Twice().init_with_output(RNGS, X)
    (in_apply, _) = Twice().apply(variables, X)
    assert_trees_equal(at_init, in_apply)


def test_draws_after_the_transform_are_those_after_a_plain_call() -> None:
    class Model(nn.Module):
        use: Callable[..., Any]

        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            self.use(models.Noisy(), x)
            return self.make_rng("dropout"), self.make_rng("params")

    plain, _ = Model(call).init_with_output(RNGS, X)
    drawn, _ = Model(TRANSFORMS["grad"]).init_with_output(RNGS, X)
    assert_trees_equal(drawn, plain)


def test_a_module_made_in_fn_is_created() -> None:
    class Model(nn.Module):
        use: Callable[..., Any]

        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            x = nn.Dense(3)(x)
            y = self.use(lambda mdl, x: jnp.sum(nn.Dense(2)(x) ** 2), self, x)
            return nn.Dense(4)(x), y

    plain = Model(lambda fn, mdl, x: fn(mdl, x)).init(RNGS, X)
    grads = lambda fn, mdl, x: lifted.grad(fn, mdl, x, grad_variables="params")  # noqa: E731
    (_, (at_init, _)), variables = Model(grads).init_with_output(RNGS, X)
    assert_trees_equal(variables, plain)
    assert set(at_init["params"]) == set(in_params := {"Dense_0", "Dense_1"}), in_params

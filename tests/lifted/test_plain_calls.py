"""`fn` runs as in a plain call: names of new modules, `setup`, shared scopes, interceptors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import lifted
from tests.helpers import (
    Inside,
    assert_trees_close,
    assert_trees_equal,
    initialized,
    normal,
    total,
)
from tests.lifted import models
from tests.lifted.transforms import RNGS, input_gradient

X = normal(4, 3)


class _Makes(nn.Module):
    """Makes submodules before, inside and after the transform."""

    use: Callable[..., Any]
    nested: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        def fn(mdl: Any, x: jax.Array) -> jax.Array:
            if self.nested:
                return self.use(lambda m, x: jnp.sum(nn.Dense(3)(x) ** 2), mdl, x)
            return jnp.sum(nn.Dense(3)(nn.Dense(4)(x)) ** 2)

        x = nn.Dense(3)(x)
        y = self.use(fn, self, x)
        return nn.Dense(2)(x), y


def _plain(fn: Callable[..., Any], mdl: Any, x: jax.Array) -> Any:
    return fn(mdl, x)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        lambda fn, mdl, x: lifted.value_and_grad(fn, mdl, x, grad_variables="params")[0],
        lambda fn, mdl, x: lifted.jvp(fn, mdl, (x,), (x,), {})[0],
        lambda fn, mdl, x: lifted.hvp(fn, mdl, (x,), (x,))[0].sum(),
    ],
)
def test_modules_made_in_fn_are_named_as_in_a_plain_call(
    use: Callable[..., Any], nested: bool
) -> None:
    if nested:
        use_once = use
        use = lambda fn, mdl, x: use_once(fn, mdl, x)  # noqa: E731
    module, plain = _Makes(use, nested), _Makes(_plain, nested)
    variables = module.init(RNGS, X)
    assert_trees_equal(variables, plain.init(RNGS, X))
    assert_trees_close(module.apply(variables, X)[0], plain.apply(variables, X)[0])


def test_modules_made_in_fn_belong_to_the_module_whose_method_runs() -> None:
    class Model(nn.Module):
        use: Callable[..., Any]

        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            child = nn.Dense(3, name="child")
            fn = lambda mdls, x: jnp.sum(nn.Dense(2)(mdls[0](x)) ** 2)  # noqa: E731
            return self.use(fn, (child, self), x)

    plain = Model(_plain).init(RNGS, X)
    ours = Model(lambda fn, mdl, x: lifted.grad(fn, mdl, x)).init(RNGS, X)
    assert_trees_equal(ours, plain)


def test_setup_of_a_module_that_was_not_set_up() -> None:
    class Model(nn.Module):
        def setup(self) -> None:
            self.inner = models.Methods()

        def __call__(self, x: jax.Array) -> Any:
            return lifted.grad(lambda mdl, x: mdl.loss(x), self.inner, x)[0]

    variables = Model().init(RNGS, X)
    inner = models.Methods().bind({"params": variables["params"]["inner"]})
    assert_trees_equal(Model().apply(variables, X), jax.grad(inner.loss)(X))


def test_a_transform_in_setup() -> None:
    class Model(nn.Module):
        def setup(self) -> None:
            self.inner = models.MLP()
            self.slope = lifted.grad(total, self.inner, jnp.ones(3))[0]

        def __call__(self, x: jax.Array) -> jax.Array:
            return x * self.slope

    variables = Model().init(RNGS, X)
    inner = models.MLP().bind({"params": variables["params"]["inner"]})
    slope = jax.grad(lambda x: total(inner, x))(jnp.ones(3))
    assert_trees_equal(Model().apply(variables, X), X * slope)


# Further parts of Linen.


def test_share_scope() -> None:
    class Sharing(nn.Module):
        def setup(self) -> None:
            self.inner = nn.Dense(2)
            nn.share_scope(self, self.inner)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.inner(x)

    module = Inside(Sharing(), lambda m, x: lifted.grad(total, m, x, grad_variables="params"))
    variables = module.init(RNGS, X)
    assert set(variables["params"]["inner"]) == {"kernel", "bias"}
    grads, _ = module.apply(variables, X)
    expected = jax.grad(lambda p: total(nn.Dense(2).bind({"params": p}), X))(
        variables["params"]["inner"]
    )
    assert_trees_equal(grads["params"], expected)


def test_a_module_that_shares_the_scope_of_another() -> None:
    class Sharing(nn.Module):
        inner: nn.Module

        def setup(self) -> None:
            nn.share_scope(self, self.inner)

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return self.inner(x) + self.param("extra", nn.initializers.ones, ())

    module = Inside(
        Sharing(nn.Dense(2)), lambda m, x: lifted.grad(total, m, x, grad_variables="params")
    )
    (at_init, _), variables = module.init_with_output(RNGS, X)
    grads, _ = module.apply(variables, X)
    assert set(grads["params"]) == {"kernel", "bias", "extra"}
    assert_trees_close(at_init, grads)


def test_compact_name_scope() -> None:
    class Scoped(nn.Module):
        @nn.compact_name_scope
        def first(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3)(x)

        @nn.compact_name_scope
        def second(self, x: jax.Array) -> jax.Array:
            return nn.Dense(2)(x)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(self.first(x))

    variables = initialized(Scoped(), X)
    grads = lifted.grad(total, Scoped().bind(variables), X, grad_variables="params")
    expected = jax.grad(lambda v, x: total(Scoped().bind(v), x), argnums=(0, 1))(variables, X)
    assert_trees_equal(grads, expected)


def test_intercepted_methods_are_those_of_a_plain_call() -> None:
    def calls(use: Callable[..., Any]) -> list[tuple[str, str]]:
        seen = []

        def spy(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext):
            if context.method_name != "<lambda>":  # Flax's own check of `setup`.
                seen.append((type(context.module).__name__, context.method_name))
            return next_fun(*args, **kwargs)

        bound = models.MLP().bind(initialized(models.MLP(), X))
        with nn.intercept_methods(spy):
            use(total, bound, X)
        return seen

    assert calls(lifted.grad) == calls(_plain)


def test_an_interceptor_changes_what_is_differentiated() -> None:
    def double(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext):
        y = next_fun(*args, **kwargs)
        return 2 * y if context.method_name == "__call__" else y

    dense = nn.Dense(2)
    bound = dense.bind(initialized(dense, X))
    (plain,) = lifted.grad(lambda m, x: m(x).sum(), bound, X)
    with nn.intercept_methods(double):
        (grad,) = lifted.grad(lambda m, x: m(x).sum(), bound, X)
    assert_trees_close(grad, 2 * plain)


@pytest.mark.parametrize("capture", [True, lambda mdl, name: True], ids=["call", "all"])
def test_captured_intermediates_are_those_of_a_plain_call(capture: Any) -> None:
    def captured(use: Callable[..., Any]) -> Any:
        module = Inside(models.Methods(), lambda mdl, x: use(lambda m, x: m.loss(x), mdl, x))
        variables = initialized(module, X)
        _, state = module.apply(
            variables, X, capture_intermediates=capture, mutable=["intermediates"]
        )
        return state["intermediates"]["inner"]

    assert_trees_close(captured(lifted.grad), captured(_plain))


def test_named_scopes_and_tables() -> None:
    module = Inside(models.MLP(), input_gradient)
    assert "inner" in module.tabulate(RNGS, X)


def test_a_module_with_arguments_by_keyword() -> None:
    module = models.Norm()
    dense = nn.BatchNorm()
    variables = initialized(module, X)
    assert variables
    variables = dense.init(RNGS, X, use_running_average=True)
    fn = lambda mdl, x: mdl(x, use_running_average=True).sum()  # noqa: E731
    (grad,) = lifted.grad(fn, dense.bind(variables), X)
    assert grad.shape == X.shape


def test_generic_classes_and_dataclass_fields() -> None:
    class Config(nn.Module):
        sizes: tuple[int, ...] = (3, 2)
        options: Any = None

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for size in self.sizes:
                x = nn.Dense(size)(x)
            return x * self.options["scale"]

    module = Config(options={"scale": jnp.float32(2.0), "table": {1: "a"}})
    variables = initialized(module, X)
    grads = lifted.grad(total, module.bind(variables), X, grad_variables="params")
    expected = jax.grad(lambda v, x: total(module.bind(v), x), argnums=(0, 1))(variables, X)
    assert_trees_equal(grads, expected)

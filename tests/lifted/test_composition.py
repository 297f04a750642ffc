"""The transforms in any order with JAX's and Linen's, and with everything else Linen modules do."""

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
    call,
    initialized,
    normal,
    strict,
    total,
)
from tests.lifted import models

X = normal(4, 3)
RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


def _grad_inside(mdl: nn.Module, x: jax.Array) -> jax.Array:
    return lifted.grad(total, mdl, x)[0]


def _raw_grad(module: nn.Module, variables: Any) -> Callable[..., Any]:
    return jax.grad(lambda x: total(module.bind(variables), x))


# Within and around raw JAX.

MODEL = Inside(models.MLP(), _grad_inside)
VARIABLES = initialized(MODEL, X)
RAW = _raw_grad(models.MLP(), {"params": VARIABLES["params"]["inner"]})
AROUND: dict[str, Callable[..., Any]] = {
    "jit": jax.jit,
    "vmap": jax.vmap,
    "grad": lambda f: jax.grad(lambda x: f(x).sum()),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,)),
    "vjp": lambda f: lambda x: jax.vjp(f, x)[1](x),
    "jacfwd": jax.jacfwd,
    "checkpoint": lambda f: jax.grad(lambda x: jax.checkpoint(f)(x).sum()),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), c), x, None, length=2),
    "cond": lambda f: lambda x: jax.lax.cond(x.sum() > 0, f, lambda x: x, x),
    "jit of vmap of grad": lambda f: jax.jit(jax.vmap(jax.grad(lambda x: f(x).sum()))),
}


@pytest.mark.parametrize("name", AROUND)
def test_inside_a_raw_transform(name: str) -> None:
    ours = AROUND[name](lambda x: MODEL.apply(VARIABLES, x))
    with strict():
        assert_trees_close(ours(X), AROUND[name](RAW)(X), factor=4)


WITHIN: dict[str, Callable[..., Any]] = {
    "jit": lambda f: jax.jit(lambda x: f(x)),
    "checkpoint": lambda f: jax.checkpoint(lambda x: f(x)),
    "vmap": lambda f: lambda x: jax.vmap(f)(x),
    "custom_jvp": lambda f: lambda x: nn.relu(f(x)),
}


@pytest.mark.parametrize("name", WITHIN)
def test_around_a_raw_transform(name: str) -> None:
    fn = lambda mdl, x: jnp.sum(jnp.sin(WITHIN[name](mdl)(x)))  # noqa: E731
    module = models.MLP()
    variables = initialized(module, X)
    with strict():
        (actual,) = lifted.grad(fn, module.bind(variables), X)
    assert_trees_close(actual, jax.grad(lambda x: fn(module.bind(variables), x))(X))


def test_a_function_with_its_own_vjp() -> None:
    @jax.custom_vjp
    def clipped(x: jax.Array) -> jax.Array:
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, t: (jnp.clip(t, -0.1, 0.1),))
    bound = models.MLP().bind(initialized(models.MLP(), X))
    (grad,) = lifted.grad(lambda mdl, x: jnp.sum(clipped(mdl(x))), bound, X)
    assert_trees_equal(grad, jax.grad(lambda x: jnp.sum(clipped(bound(x))))(X))


def test_a_lifted_custom_vjp() -> None:
    class Clipped(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            def forward(mdl: nn.Module, x: jax.Array) -> Any:
                return nn.vjp(lambda mdl, x: mdl(x), mdl, x)

            backward = lambda vjp, t: vjp(jnp.clip(t, -0.1, 0.1))  # noqa: E731
            return nn.custom_vjp(call, forward, backward)(models.MLP(), x)

    module = Clipped()
    variables = initialized(module, X)
    grads = lifted.grad(total, module.bind(variables), X, grad_variables="params")
    expected = jax.grad(lambda v, x: total(module.bind(v), x), argnums=(0, 1))(variables, X)
    assert_trees_equal(grads, expected)


# Within and around Linen's.

LINEN: dict[str, Callable[..., Any]] = {
    "vmap": lambda cls: nn.vmap(
        cls, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}
    ),
    "remat": nn.remat,
    "jit": nn.jit,
    "map_variables": lambda cls: nn.map_variables(
        cls, "params", lambda v: jax.tree.map(lambda x: 2 * x, v), init=True
    ),
}


class _GradModel(nn.Module):
    """A transform inside of a module that is transformed by Linen."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return lifted.grad(total, models.MLP(), x)[0]


class _RawGradModel(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = models.MLP()
        inner(x)
        return jax.grad(lambda x: total(inner, x))(x)


@pytest.mark.parametrize("name", LINEN)
def test_inside_a_linen_transform(name: str) -> None:
    ours, raw = (LINEN[name](cls)() for cls in (_GradModel, _RawGradModel))
    rename = lambda v: jax.tree.leaves(v)  # noqa: E731
    assert_trees_equal(rename(ours.init(RNGS, X)), rename(raw.init(RNGS, X)))
    variables = ours.init(RNGS, X)
    raw_variables = raw.init(RNGS, X)
    assert_trees_close(ours.apply(variables, X), raw.apply(raw_variables, X))


@pytest.mark.parametrize("name", LINEN)
def test_around_a_linen_transform(name: str) -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return LINEN[name](models.MLP)(name="inner")(x)

    variables = initialized(Model(), X)
    with strict():
        grads = lifted.grad(total, Model().bind(variables), X, grad_variables="params")
    expected = jax.grad(lambda v, x: total(Model().bind(v), x), argnums=(0, 1))(variables, X)
    assert_trees_close(grads, expected)


def test_inside_a_linen_scan() -> None:
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: Any) -> Any:
            (grad,) = lifted.grad(total, models.Norm(), x)
            return x + grad, None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            axes = {"params": 0, "batch_stats": 0}
            return nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=2)()(
                x, None
            )[0]

    variables = Model().init(RNGS, X)
    with strict():
        y, updates = Model().apply(variables, X, mutable=["batch_stats"])
    x, means = X, []
    for i in range(2):
        layer = jax.tree.map(lambda v, i=i: v[i], variables)
        layer = {c: v["ScanStep_0"]["Norm_0"] for c, v in layer.items()}

        def loss(x: jax.Array, layer: Any = layer) -> Any:
            y, stats = models.Norm().apply(layer, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), stats

        grad, stats = jax.grad(loss, has_aux=True)(x)
        x = x + grad
        means.append(stats["batch_stats"]["BatchNorm_0"]["mean"])
    assert_trees_close(y, x, factor=4)
    actual = updates["batch_stats"]["ScanStep_0"]["Norm_0"]["BatchNorm_0"]["mean"]
    assert_trees_close(actual, jnp.stack(means), factor=4)


def test_jacobian_over_scanned_layers() -> None:
    """google/flax #4771."""
    module = models.Scanned()
    variables = initialized(module, X[0])
    (actual,) = lifted.jacfwd(call, module.bind(variables), X[0])
    (reverse,) = lifted.jacrev(call, module.bind(variables), X[0])
    assert_trees_equal(actual, jax.jacfwd(module.bind(variables))(X[0]))
    assert_trees_close(actual, reverse)


# With themselves.


def _second(mdl: nn.Module, x: jax.Array) -> jax.Array:
    _, dot = lifted.jvp(lambda m, x: lifted.grad(total, m, x)[0], mdl, (x,), (x,), {})
    return jnp.sum(dot**2)


def test_forward_over_reverse_over_forward_over_reverse() -> None:
    module = models.MLP()
    variables = initialized(module, X)
    bound = module.bind(variables)

    def raw(variables: Any, x: jax.Array) -> jax.Array:
        grad = jax.grad(lambda x: total(module.bind(variables), x))
        return jnp.sum(jax.jvp(grad, (x,), (x,))[1] ** 2)

    gradient = lambda m, x: lifted.grad(_second, m, x, grad_variables="params")  # noqa: E731
    actual = lifted.jvp(gradient, bound, (X,), (X,), {})
    expected = jax.jvp(lambda x: jax.grad(raw, argnums=(0, 1))(variables, x), (X,), (X,))
    assert_trees_equal(actual, expected)


def test_hvp_is_forward_over_reverse() -> None:
    bound = models.MLP().bind(initialized(models.MLP(), X))
    inner = lambda m, x: lifted.grad(total, m, x)  # noqa: E731
    _, expected = lifted.jvp(inner, bound, (X,), (X,), {})
    assert_trees_equal(lifted.hvp(total, bound, (X,), (X,)), expected)


def test_writes_of_nested_transforms_happen_once() -> None:
    module = models.Counter()
    variables = module.init(RNGS, X)
    nested = lambda mdl, x: lifted.jvp(_grad_inside, mdl, (x,), (x,), {})  # noqa: E731
    with strict():
        _, updates = nn.apply(nested, module, mutable=["state"])(variables, X)
    assert updates["state"]["count"] == 1


# What modules do.


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
        _, updates = Model(_grad_inside).apply(variables, X, mutable=["batch_stats"])
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
    actual = Model(_grad_inside).apply(variables, X)
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
    inner = METHODS.bind({"params": variables["params"]["inner"]})
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
    module = Inside(models.MLP(), _grad_inside)
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

"""Tangents of variables: anything may be left out, None or zero; boxes may be kept or dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.core import freeze, meta

import lifted
from tests.helpers import assert_trees_equal, call, initialized, normal, normal_like
from tests.lifted import models

X = normal(4, 3)
MODULE = models.Norm(train=False)
VARIABLES = initialized(MODULE, X)
KERNEL_DOT = normal(3, 3, seed=11)


def _jvp(tangents: Any, t_x: Any = None, module: nn.Module = MODULE, variables: Any = None) -> Any:
    bound = module.bind(VARIABLES if variables is None else variables)
    return lifted.jvp(call, bound, (X,), (t_x,), tangents)


def _raw(full: Any, t_x: Any = None) -> Any:
    """Raw `jax.jvp` with a tangent for every leaf."""
    t_x = jnp.zeros_like(X) if t_x is None else t_x
    return jax.jvp(MODULE.apply, (VARIABLES, X), (full, t_x))


def _zeros() -> Any:
    return jax.tree.map(jnp.zeros_like, VARIABLES)


def _only_the_kernel() -> Any:
    full = _zeros()
    full["params"]["Dense_0"]["kernel"] = KERNEL_DOT
    return full


PARTIAL: dict[str, Any] = {
    "collection left out": {"params": _only_the_kernel()["params"]},
    "collection is None": {**_only_the_kernel(), "batch_stats": None},
    "collection is empty": {**_only_the_kernel(), "batch_stats": {}},
    "subtrees left out": {"params": {"Dense_0": {"kernel": KERNEL_DOT}}},
    "subtree is None": {"params": {"Dense_0": {"kernel": KERNEL_DOT}, "Dense_1": None}},
    "leaf is None": {"params": {"Dense_0": {"kernel": KERNEL_DOT, "bias": None}}},
    "all are given": _only_the_kernel(),
    "frozen": freeze({"params": {"Dense_0": {"kernel": KERNEL_DOT}}}),
    "numpy": jax.tree.map(jax.device_get, _only_the_kernel()),
}


@pytest.mark.parametrize("tangents", PARTIAL.values(), ids=PARTIAL)
def test_what_is_left_out_is_zero(tangents: Any) -> None:
    assert_trees_equal(_jvp(tangents), _raw(_only_the_kernel()))


@pytest.mark.parametrize("nothing", [None, {}, {"params": None}, {"params": {}}], ids=str)
def test_no_tangents_at_all_mean_zero(nothing: Any) -> None:
    assert_trees_equal(_jvp(nothing), _raw(_zeros()))


def test_an_unknown_name_without_tangents_is_passed_over() -> None:
    assert_trees_equal(_jvp({"cache": {}, "params": None}), _raw(_zeros()))


def test_tangents_of_statistics() -> None:
    full = _zeros()
    full["batch_stats"] = normal_like(VARIABLES["batch_stats"])
    assert_trees_equal(_jvp({"batch_stats": full["batch_stats"]}), _raw(full))


def test_tangents_of_the_input() -> None:
    t_x = normal_like(X)
    assert_trees_equal(_jvp({}, t_x), _raw(_zeros(), t_x))


def test_tangents_of_primals_may_be_partial() -> None:
    fn = lambda mdl, batch: mdl(batch["x"]) * batch["scale"] + batch["n"]  # noqa: E731
    batch = {"x": X, "scale": jnp.float32(2.0), "n": 3}
    bound = MODULE.bind(VARIABLES)
    _, actual = lifted.jvp(fn, bound, (batch,), ({"scale": 1.0},), {})
    _, expected = jax.jvp(lambda s: fn(bound, {**batch, "scale": s}), (batch["scale"],), (1.0,))
    assert_trees_equal(actual, expected)


def test_variables_in_a_frozen_dict() -> None:
    bound = MODULE.bind(freeze(VARIABLES))
    actual = lifted.jvp(call, bound, (X,), (None,), PARTIAL["subtrees left out"])
    assert_trees_equal(actual, _raw(_only_the_kernel()))


def test_frozen_dicts_when_flax_returns_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import flax

    flax.config.update("flax_return_frozendict", True)
    try:
        module = models.Norm()
        variables = module.init(jax.random.key(0), X)
        grads = lambda mdl, x: lifted.grad(  # noqa: E731
            lambda m, x: m(x).sum(), mdl, x, grad_variables="params"
        )
        _, updates = nn.apply(grads, module, mutable=["batch_stats"])(variables, X)
        _, plain = module.apply(variables, X, mutable=["batch_stats"])
    finally:
        flax.config.update("flax_return_frozendict", False)
    assert jax.tree.structure(updates) == jax.tree.structure(plain)


class UserBox(meta.AxisMetadata[Any]):
    """A box of a user, not registered with Flax by name."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> UserBox:
        return UserBox(val)

    def add_axis(self, index: int, params: Any) -> UserBox:
        return self

    def remove_axis(self, index: int, params: Any) -> UserBox:
        return self


jax.tree_util.register_pytree_node(UserBox, lambda b: ((b.value,), None), lambda _, c: UserBox(*c))


def _user_box(init: Callable[..., Any], names: Any) -> Callable[..., Any]:
    return lambda *args: UserBox(init(*args))


BOXES = {
    "partitioned": nn.with_partitioning,
    "logical": nn.with_logical_partitioning,
    "user": _user_box,
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("form", ["boxed", "plain"])
def test_a_boxed_variable_takes_either_form(box: Callable[..., Any], form: str) -> None:
    module = models.Boxed(box)
    variables = initialized(module, X)
    dots = normal_like(variables)
    expected = jax.jvp(lambda v: module.apply(v, X), (variables,), (dots,))
    given = dots if form == "boxed" else meta.unbox(dots)
    assert_trees_equal(_jvp(given, None, module, variables), expected)


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_gradients_of_boxed_variables_are_boxed(box: Callable[..., Any]) -> None:
    module = models.Boxed(box)
    variables = initialized(module, X)
    loss = lambda mdl, x: mdl(x).sum()  # noqa: E731
    grads, _ = lifted.grad(loss, module.bind(variables), X, grad_variables="params")
    expected = jax.grad(lambda v: module.apply(v, X).sum())(variables)
    assert_trees_equal(grads, expected)


def test_a_plain_variable_takes_a_boxed_tangent() -> None:
    boxed = nn.Partitioned(KERNEL_DOT, (None, None))
    tangents = {"params": {"Dense_0": {"kernel": boxed}}}
    assert_trees_equal(_jvp(tangents), _raw(_only_the_kernel()))


def test_the_variables_of_the_module_are_tangents() -> None:
    """As in the documentation of Linen's `jvp`."""

    class LearnScale(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return self.param("test", nn.initializers.ones, ()) * x

    class Foo(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            scale = LearnScale()
            vars_t = jax.tree.map(jnp.ones_like, scale.variables.get("params", {}))
            _, out_t = lifted.jvp(
                lambda mdl, x: mdl(x),
                scale,
                (x,),
                (jnp.zeros_like(x),),
                variable_tangents={"params": vars_t},
            )
            return out_t

    variables = Foo().init(jax.random.key(0), 3.0)
    assert Foo().apply(variables, 3.0) == 3.0


def test_tangents_of_written_variables() -> None:
    module = models.Norm()
    t_x = normal_like(X)

    def transform(mdl: nn.Module, x: jax.Array) -> Any:
        return lifted.jvp(call, mdl, (x,), (t_x,), {}, return_variable_tangents=True)

    (_, _, dots), _ = nn.apply(transform, module, mutable=["batch_stats"])(VARIABLES, X)
    raw = lambda x: module.apply(VARIABLES, x, mutable=["batch_stats"])[1]  # noqa: E731
    assert_trees_equal(dots, jax.jvp(raw, (X,), (t_x,))[1])


def test_tangents_of_written_integers_are_trivial() -> None:
    module = models.Counter()
    variables = module.init(jax.random.key(0), X)

    def transform(mdl: nn.Module, x: jax.Array) -> Any:
        return lifted.jvp(call, mdl, (x,), (x,), {}, return_variable_tangents=True)[2]

    dots, _ = nn.apply(transform, module, mutable=["state"])(variables, X)
    assert dots["state"]["count"].dtype == jax.dtypes.float0
    assert dots["state"]["mean"].dtype == jnp.float32


@pytest.mark.parametrize("given", [{"encoder": {"kernel": jnp.ones((3, 3))}}, {}, None], ids=str)
def test_linearize_takes_partial_tangents(given: Any) -> None:
    module = models.Methods()
    variables = initialized(module, X)
    bound = module.bind(variables)
    _, f_jvp = lifted.linearize(call, bound, X, grad_variables="params")
    _, expected = lifted.jvp(call, bound, (X,), (None,), {"params": given})
    actual = f_jvp({"params": given}, None)
    assert actual.shape == expected.shape
    assert jnp.allclose(actual, expected)


def test_a_pytree_of_modules_takes_a_pytree_of_tangents() -> None:
    a, b = models.MLP(out=3).bind(initialized(models.MLP(out=3), X)), MODULE.bind(VARIABLES)
    fn = lambda mdls, x: mdls["b"](mdls["a"](x))  # noqa: E731
    only_b = PARTIAL["subtrees left out"]
    given = {"a": None, "b": only_b}
    actual = lifted.jvp(fn, {"a": a, "b": b}, (X,), (None,), given)
    expected = lifted.jvp(call, b, (a(X),), (None,), only_b)
    assert_trees_equal(actual, expected)

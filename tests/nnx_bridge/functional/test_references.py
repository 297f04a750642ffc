"""Variables that keep their values elsewhere, in mutable array references or in hijax values, are
read, written, differentiated and created as plain ones are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.errors import ImmutableVariableError

import lifted
import nnx_bridge
from tests.helpers import assert_trees_close, assert_trees_equal, call, normal, normal_like, total
from tests.lifted.calls import every_transform
from tests.nnx_bridge import models
from tests.nnx_bridge.functional.test_writes import EDITS, assert_modules_equal, editing
from tests.nnx_bridge.raw import PAIRS

X = normal(4, 3)
KINDS: dict[str, dict[str, bool]] = {
    "reference": {"ref": True},
    "hijax": {"hijax": True},
    "hijax reference": {"ref": True, "hijax": True},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def stored(mdl: Any, kind: str) -> Any:
    """A copy of a module with Variables of a kind."""
    return nnx.with_vars(mdl, allow_duplicates=True, **KINDS[kind])


def plain(tree: Any) -> Any:
    return nnx.with_vars(tree, ref=False, hijax=False, allow_duplicates=True)


def references(mdl: Any) -> list[int]:
    return [id(v.get_raw_value()) for _, v in nnx.iter_graph(mdl) if isinstance(v, nnx.Variable)]


def kinds(mdl: Any) -> list[tuple[bool, bool]]:
    return [(v.ref, v.hijax) for _, v in nnx.iter_graph(mdl) if isinstance(v, nnx.Variable)]


@each_kind
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "hessian"])
@pytest.mark.parametrize("model", ["counter", "shared"])
def test_results_and_writes_are_those_of_plain_variables(
    model: str, transform: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tangents: of the values, not of what holds them.
    monkeypatch.setattr("tests.nnx_bridge.raw.normal_like", lambda t: normal_like(_values(t)))
    simple = models.make(models.MODELS[model])
    mdl = stored(simple, kind)
    held = references(mdl)
    fn = PAIRS[transform][0]
    result, expected = fn(mdl, X), fn(simple, X)
    assert_trees_equal(jax.tree.leaves(result), jax.tree.leaves(expected))
    assert_modules_equal(plain(mdl), simple)
    if KINDS[kind].get("ref"):
        assert references(mdl) == held  # Written into, not replaced.


def _values(tree: Any) -> Any:
    return plain(tree) if isinstance(tree, nnx.State) else tree


@pytest.mark.parametrize("kind", ["reference", "hijax"])
@pytest.mark.parametrize("name", EDITS)
def test_the_graph_is_that_after_a_plain_call(name: str, kind: str) -> None:
    mdl, expected = (stored(models.make(models.MLP), kind) for _ in range(2))
    lifted.grad(editing(EDITS[name]), mdl, X, grad_variables=nnx.Param)
    EDITS[name](expected, X)
    assert_modules_equal(plain(mdl), plain(expected))
    assert kinds(mdl) == kinds(expected)


def test_variables_of_a_changed_graph_are_still_the_same_objects() -> None:
    mdl = stored(models.make(models.MLP), "reference")
    kernel, reference = mdl.first.kernel, mdl.first.kernel.get_raw_value()

    def fn(mdl: Any, x: jax.Array) -> jax.Array:
        mdl.first.kernel[...] *= 2
        mdl.second.tied = mdl.first.kernel
        return total(mdl, x)

    before = kernel[...]
    lifted.grad(fn, mdl, X)
    assert mdl.first.kernel is kernel is mdl.second.tied
    assert kernel.get_raw_value() is reference
    assert_trees_equal(reference[...], 2 * before)


def test_a_reference_that_fn_makes_is_one_afterwards() -> None:
    def fn(mdl: Any, x: jax.Array) -> jax.Array:
        mdl.seen = nnx.Variable(x**2, ref=True)
        return total(mdl, x)

    mdl = models.make(models.MLP)
    lifted.jvp(lambda m, x: lifted.grad(fn, m, x), mdl, (X[:1],), (X[:1],), {})
    assert mdl.seen.ref
    assert_trees_equal(mdl.seen.get_raw_value()[...], X[:1] ** 2)


@each_kind
def test_gradients_are_plain_and_update_the_module(kind: str) -> None:
    simple = models.make(models.Norm)
    mdl = stored(simple, kind)
    for target in (mdl, simple):
        grads, _ = lifted.grad(total, target, X, grad_variables=nnx.Param)
        assert all(isinstance(g, jax.Array) for g in jax.tree.leaves(grads))
        for path, grad in nnx.to_flat_state(grads):
            variable = getattr(getattr(target, path[0]), path[1])
            variable[...] = variable[...] - 0.1 * grad[...]
    assert_modules_equal(plain(mdl), simple)


@each_kind
@pytest.mark.parametrize("form", ["state", "module", "dict"])
def test_tangents_may_hold_references(form: str, kind: str) -> None:
    mdl = models.make(models.MLP)
    expected = lifted.jvp(call, mdl, (X,), (None,), nnx.state(mdl))
    mdl = stored(mdl, kind)
    tangents = {
        "state": lambda: nnx.state(mdl),
        "module": lambda: mdl,
        "dict": lambda: {"params": {k: dict(v) for k, v in nnx.state(mdl).items()}},
    }[form]()
    assert_trees_equal(lifted.jvp(call, mdl, (X,), (None,), tangents), expected)


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit], ids=["jax.jit", "nnx.jit"])
def test_references_inside_jit(jit: Callable[..., Any]) -> None:
    simple = models.make(models.Norm)
    mdl = stored(simple, "reference")
    fn = lambda mdl, x: lifted.grad(total, mdl, x, grad_variables=nnx.Param)  # noqa: E731
    assert_trees_close(jit(fn)(mdl, X), fn(simple, X))
    assert_trees_close(nnx.state(plain(mdl)), nnx.state(simple))


@every_transform
def test_a_shape_that_a_reference_cannot_hold(transform: Callable[..., Any]) -> None:
    def fn(mdl: Any, x: jax.Array) -> jax.Array:
        y = total(mdl, x)
        mdl.first.bias.set_value(jnp.zeros(5))
        return y

    mdl = stored(models.make(models.MLP), "reference")
    with pytest.raises(
        ValueError, match=r"first/bias: fn wrote float32\[5\] to .* float32\[3\].*ref=False"
    ):
        transform(fn, mdl)
    assert mdl.first.bias.shape == (3,)


class Sower(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 2, rngs=rngs)
        self.calls = nnx.Variable(jnp.float32(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        y = self.perturb("y", self.dense(x))
        self.sow(nnx.Intermediate, "y", y)
        return jnp.sin(y).sum()


class Counting(nnx.Module):
    def __init__(self) -> None:
        self.calls = nnx.Variable(jnp.float32(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        return jnp.sin(x).sum()


def test_the_path_of_a_hijax_variable_that_flax_does_not_let_write() -> None:
    mdl = stored(Counting(), "hijax")
    fn = jax.jit(lambda mdl, x: lifted.grad(call, mdl, x))
    try:
        jax.jit(call)(mdl, X)
    except ImmutableVariableError:
        with pytest.raises(ImmutableVariableError) as error:
            fn(mdl, X)
        assert any("The Variable is calls" in note for note in error.value.__notes__)
    else:  # Older versions of Flax let it be written here, too.
        assert_trees_close(fn(mdl, X), (jnp.cos(X),))
        assert mdl.calls[...] == 2


@each_kind
def test_captures_of_a_module_with_references(kind: str) -> None:
    simple = models.make(Sower)
    expected = nnx_bridge.capture_grad(call, simple, X)
    mdl = stored(models.make(Sower), kind)
    actual = nnx_bridge.capture_grad(call, mdl, X)
    for name in ("value", "grads", "intermediates", "intermediate_grads"):
        assert_trees_equal(
            jax.tree.leaves(getattr(actual, name)), jax.tree.leaves(getattr(expected, name))
        )
    y, sown = nnx_bridge.capture(mdl, nnx.Intermediate)(X)
    assert_trees_equal(sown["y"].get_value(), (mdl.dense(X),))
    assert mdl.calls[...] == 2


@each_kind
def test_captures_where_new_variables_are_references(kind: str) -> None:
    expected = nnx_bridge.capture(models.make(Sower), nnx.Intermediate, nnx.Perturbation)(X)
    with nnx.var_defaults(**KINDS[kind]):
        capture = nnx_bridge.capture(Sower(nnx.Rngs(0)), nnx.Intermediate, nnx.Perturbation)
        _, sown, zeros = capture(X)
    assert [len(s.get_value()) for s in sown.values()] == [1]
    assert jax.tree.structure((sown, zeros)) == jax.tree.structure(expected[1:])

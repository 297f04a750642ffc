"""Layers in the branch that was taken, and in the first step of a `while`, are compared too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from nnx_bridge import Host, Report, compare
from nnx_bridge.equivalence._tags import hoisted, tagged

X = jax.ShapeDtypeStruct((2, 4), "float32")
Activation = Callable[[jax.Array], jax.Array]


class Layer(nn.Module):
    """What may have the fault."""

    activation: Activation = nn.tanh

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activation(nn.Dense(4, name="dense")(x))


class Branching(nn.Module):
    """Two layers, of which one is called: as branches, or by Python."""

    first: bool
    activations: tuple[Activation, Activation] = (nn.tanh, nn.tanh)
    plain: bool = False

    def setup(self) -> None:
        self.left, self.right = map(Layer, self.activations)
        self.head = nn.Dense(1)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_initializing():
            self.left(x), self.right(x)
        if self.plain:
            return self.head((self.left if self.first else self.right)(x))
        goes_left = jnp.all(jnp.isfinite(x)) if self.first else jnp.any(jnp.isnan(x))
        branches = (lambda mdl, x: mdl.left(x), lambda mdl, x: mdl.right(x))
        return self.head(nn.cond(goes_left, *branches, self, x))


class NativeLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, activation: Activation) -> None:
        self.dense, self.activation = nnx.Linear(4, 4, rngs=rngs), activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activation(self.dense(x))


class Native(nnx.Module):
    """The rewrite of `Branching`."""

    def __init__(self, activation: Activation = jnp.tanh) -> None:
        rngs = nnx.Rngs(0)
        self.left, self.right = (NativeLayer(rngs, activation) for _ in range(2))
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        branches = (lambda mdl, x: mdl.left(x), lambda mdl, x: mdl.right(x))
        return self.head(nnx.cond(jnp.all(jnp.isfinite(x)), *branches, self, x))


class Looping(nn.Module):
    """A layer that is called until its output is small, or never."""

    activation: Activation = nn.tanh
    limit: float = 0.5

    def setup(self) -> None:
        self.layer, self.head = Layer(self.activation), nn.Dense(1)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_initializing():
            self.layer(x)
        large = lambda mdl, x: jnp.max(jnp.abs(x)) > self.limit  # noqa: E731
        step = lambda mdl, x: mdl.layer(x) / 2  # noqa: E731
        return self.head(nn.while_loop(large, step, self, x))


class Steps(nn.Module):
    """A scan, in whose every step another layer is called."""

    activation: Activation = nn.tanh

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        steps = nn.scan(Step, length=3, **axes)(self.activation, name="steps")
        return steps(x, jnp.arange(3))[0]


class Step(nn.Module):
    activation: Activation

    def setup(self) -> None:
        self.even, self.odd = Layer(), Layer(self.activation)

    def __call__(self, x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        if self.is_initializing():
            self.even(x), self.odd(x)
        layers = [lambda mdl, x: mdl.even(x), lambda mdl, x: mdl.odd(x)]
        return nn.switch(i % 2, layers, self, x), None


def check(reference: Any, model: Any) -> Report:
    return compare(reference, model, X, seeds=1, steps=1)


def calls(report: Report, what: str = "layer output") -> set[str]:
    return {row.path.partition(" [")[0] for row in report.rows if row.what == what}


@pytest.mark.parametrize("first", [True, False])
def test_only_the_branch_that_was_taken_is_compared(first: bool) -> None:
    taken, other = ("left", "right") if first else ("right", "left")
    report = check(Branching(first), Branching(first))
    report.assert_equal()
    for what in ("layer output", "layer output gradient"):
        assert {taken, f"{taken}/dense", "head"} <= calls(report, what)
        assert not {other, f"{other}/dense"} & calls(report, what)


@pytest.mark.parametrize("plain", [False, True], ids=["as branches", "by Python"])
def test_a_fault_in_the_branch_that_was_taken_is_named(plain: bool) -> None:
    wrong = Branching(False, (nn.tanh, nn.sigmoid), plain)
    report = check(Branching(False), wrong)
    assert report.parting is not None
    assert report.parting.path == "right"
    assert "it is after right/dense" in report.parting.reason


def test_a_fault_in_the_other_branch_is_none() -> None:
    check(Branching(True), Branching(True, (nn.tanh, nn.sigmoid))).assert_equal()


def test_taking_the_wrong_branch_is_a_fault_of_the_module_that_chooses() -> None:
    report = check(Branching(True), Branching(False))
    assert report.parting is not None
    assert (report.parting.path, report.parting.module) == ("", "Branching")
    assert "before head" in report.parting.reason


def test_a_wrong_gradient_in_a_branch_is_named() -> None:
    def halved(x: jax.Array) -> jax.Array:
        y = nn.tanh(x)
        return y / 2 + jax.lax.stop_gradient(y / 2)

    report = check(Branching(True), Branching(True, (halved, nn.tanh)))
    assert report.parting is not None
    assert report.parting.path == "left"
    assert "the gradient of its output agrees" in report.parting.reason


@pytest.mark.parametrize("activation", [jnp.tanh, nnx.sigmoid], ids=["right", "wrong"])
def test_branches_of_nnx_are_seen(activation: Activation) -> None:
    report = check(Branching(True), Native(activation))
    assert "left/dense" in calls(report)
    assert "right/dense" not in calls(report)
    assert (report.parting and report.parting.path) == (None if report.agrees else "left")
    assert report.agrees is (activation is jnp.tanh)


def test_a_branch_in_a_step_of_a_loop_counts_in_the_steps_that_took_it() -> None:
    report = check(Steps(), Steps())
    report.assert_equal()
    found = {call for call in calls(report) if call.startswith(("steps/even ", "steps/odd "))}
    assert found == {"steps/even (step 1)", "steps/odd (step 2)", "steps/even (step 3)"}
    report = check(Steps(), Steps(nn.sigmoid))
    assert report.parting is not None
    assert report.parting.path == "steps/odd"
    assert "first in step 2" in report.parting.reason


def test_of_a_while_the_first_step_is_compared() -> None:
    report = check(Looping(), Looping())
    report.assert_equal()
    assert {"layer", "layer/dense", "head"} <= calls(report)
    report = check(Looping(), Looping(nn.sigmoid))
    assert report.parting is not None
    assert report.parting.path == "layer"


def test_of_a_while_without_steps_nothing_inside_is_compared() -> None:
    report = check(Looping(limit=99.0), Looping(limit=99.0))
    report.assert_equal()
    assert not {"layer", "layer/dense"} & calls(report)
    assert "head" in calls(report)


def test_hosted_branches_are_seen() -> None:
    variables = Branching(True).init(jax.random.key(0), jnp.ones((2, 4)))
    report = check(Branching(True), Host(Branching(True), variables))
    report.assert_equal()
    assert "left/dense" in calls(report)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_while_gives_what_it_gave(steps: int) -> None:
    def loop(n: jax.Array) -> Any:
        def step(carry: Any) -> Any:
            i, x, key = carry
            return i + 1, tagged(x * 2.0, "inside"), jax.random.split(key)[0]

        start = (jnp.int32(0), jnp.float32(1), jax.random.key(0))
        return jax.lax.while_loop(lambda carry: carry[0] < n, step, start)

    result, (inside,) = jax.jit(lambda n: _values(*hoisted(loop, n)))(jnp.int32(steps))
    expected = loop(jnp.int32(steps))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), result, expected))
    assert (float(inside[0]), bool(inside[1])) == ((2.0, True) if steps else (0.0, False))


def _values(result: Any, found: Any) -> Any:
    return result, [(each.value, each.ran) for each in found]

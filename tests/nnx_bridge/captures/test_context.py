"""Capture contexts: that they are those of `nnx.capture`, without its faults."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.errors import TraceContextError

import lifted
import nnx_bridge
from tests.helpers import assert_trees_close, assert_trees_equal, normal, strict


class Block(nnx.Module):
    """Sows, perturbs, and updates statistics."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow(nnx.Intermediate, "input", x)
        return self.perturb("hidden", jnp.tanh(self.norm(self.dense(x))))


class Pair(nnx.Module):
    """Perturbs a pytree."""

    def __call__(self, x: jax.Array) -> jax.Array:
        pair = self.perturb("pair", {"once": x, "twice": (2 * x,)})
        return pair["once"] * pair["twice"][0]


class Nested(nnx.Module):
    """Captures a submodule inside its own call."""

    def __init__(self, rngs: nnx.Rngs, capture: Callable[..., Any] = nnx_bridge.capture) -> None:
        self.block = Block(rngs)
        self.capture = nnx.static(capture)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, nnx.State]:
        self.sow(nnx.Intermediate, "before", x)
        y, inner = self.capture(self.block, nnx.Intermediate)(x)
        self.sow(nnx.Intermediate, "after", y)
        return y, inner


def block() -> Block:
    return Block(nnx.Rngs(0))


def marks(module: nnx.Module) -> set[str]:
    return {name for _, m in nnx.iter_modules(module) for name in vars(m) if "capture" in name}


X = normal(4, 3)


def test_it_records_what_flax_records() -> None:
    expected = nnx.capture(block(), nnx.Intermediate)(X)
    assert_trees_equal(nnx_bridge.capture(block(), nnx.Intermediate)(X), expected)


def test_statistics_are_updated_as_by_a_plain_call() -> None:
    captured, plain = block(), block()
    nnx_bridge.capture(captured, nnx.Intermediate)(X)
    plain.norm(plain.dense(X))
    assert_trees_equal(nnx.state(captured), nnx.state(plain))


@pytest.mark.parametrize("types", [(nnx.Intermediate, nnx.Perturbation)[::s] for s in (1, -1)])
def test_each_state_holds_its_own_type_in_either_order(types: Any) -> None:
    _, *states = nnx_bridge.capture(block(), *types)(X)
    names = {kind: list(state) for kind, state in zip(types, states, strict=True)}
    assert names == {nnx.Intermediate: ["input"], nnx.Perturbation: ["hidden"]}


def test_an_exception_leaves_no_mark_and_no_statistics() -> None:
    def fail(mdl: Block, x: jax.Array) -> None:
        mdl(x)
        raise RuntimeError("inside")

    mdl = block()
    with pytest.raises(RuntimeError, match="inside"):
        nnx_bridge.capture(fail, nnx.Intermediate, method_outputs=nnx.Intermediate)(mdl, X)
    assert marks(mdl) == set()
    assert type(mdl) is Block
    assert_trees_equal(nnx.state(mdl), nnx.state(block()))


@pytest.mark.parametrize("outer", [nnx_bridge.capture, nnx.capture])
def test_of_nested_contexts_each_gets_what_was_sown_in_it(outer: Any) -> None:
    (_, inner), sown = outer(Nested(nnx.Rngs(0)), nnx.Intermediate)(X)
    assert list(inner) == ["input"]
    assert sorted(k for k, v in nnx.to_flat_state(sown)) == [("after",), ("before",)]


def test_a_type_that_the_inner_context_does_not_record_reaches_the_outer_one() -> None:
    (_, inner), sown = nnx_bridge.capture(Nested(nnx.Rngs(0)), nnx.Perturbation)(X)
    assert [k for k, _ in nnx.to_flat_state(sown)] == [("block", "hidden")]


def test_flax_capture_finds_the_same_context() -> None:
    mdl = Nested(nnx.Rngs(0), capture=nnx.capture)
    _, sown = nnx_bridge.capture(mdl.block, nnx.Intermediate)(X)
    assert list(sown) == ["input"]


def test_pytrees_are_perturbed_leaf_by_leaf() -> None:
    y, zeros = nnx_bridge.capture(Pair(), nnx.Perturbation)(2.0)
    moved = jax.tree.map(lambda x: x + 1.0, zeros)
    perturbed = nnx_bridge.capture(Pair(), init=moved)(2.0)
    assert (float(y), float(perturbed)) == (8.0, 15.0)


class Base(nnx.Module):
    def features(self, x: jax.Array) -> jax.Array:
        return x + 1

    def _private(self, x: jax.Array) -> jax.Array:
        return x


class Derived(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        return 2 * self._private(self.features(x))


def test_outputs_of_inherited_methods_are_sown() -> None:
    capture = nnx_bridge.capture(Derived(), nnx.Intermediate, method_outputs=nnx.Intermediate)
    _, sown = capture(1.0)
    assert {k: v.get_value() for k, v in sown.items()} == {"__call__": (4.0,), "features": (2.0,)}


def test_classes_are_not_touched_while_outputs_are_sown() -> None:
    seen = []

    def look(mdl: Derived, x: float) -> float:
        seen.append(Derived.__call__)
        return mdl(x)

    before = Derived.__call__
    nnx_bridge.capture(look, nnx.Intermediate, method_outputs=nnx.Intermediate)(Derived(), 1.0)
    assert seen == [before]


def test_the_setup_of_a_hosted_module_is_no_method_whose_output_counts() -> None:
    host = nnx_bridge.Host.init(nn.Embed(3, 2), jax.random.key(0), jnp.zeros(1, jnp.int32))
    capture = nnx_bridge.capture(host, nnx.Intermediate, method_outputs=nnx.Intermediate)
    assert list(capture(jnp.zeros(1, jnp.int32))[1]) == ["__call__"]


@pytest.mark.parametrize("fails", [False, True])
def test_copies_get_their_classes_back(fails: bool) -> None:
    copies = []

    def call(mdl: Derived, x: float) -> float:
        copies.append(mdl)
        return mdl(None if fails else x)

    capture = nnx_bridge.capture(call, nnx.Intermediate, method_outputs=nnx.Intermediate)
    with pytest.raises(TypeError, match="NoneType") if fails else contextlib.nullcontext():
        capture(Derived(), 1.0)
    assert [type(mdl) for mdl in copies] == [Derived]


def test_threads_do_not_see_each_others_captures() -> None:
    mdl, barrier, results = Derived(), threading.Barrier(2), {}

    def wait(mdl: Derived, x: float) -> float:
        barrier.wait()
        mdl.sow(nnx.Intermediate, "x", x)
        barrier.wait()
        return mdl(x)

    def run(x: float) -> None:
        results[x] = nnx_bridge.capture(wait, nnx.Intermediate)(mdl, x)[1]["x"].get_value()

    threads = [threading.Thread(target=run, args=(x,)) for x in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {1.0: (1.0,), 2.0: (2.0,)}


@pytest.mark.parametrize("wrap", [nnx.jit, nnx.remat, jax.named_call], ids=lambda f: f.__name__)
def test_transforms_inside_the_context(wrap: Any) -> None:
    call = wrap(lambda mdl, x: mdl(x))
    _, sown = nnx_bridge.capture(call, nnx.Intermediate)(block(), X)
    np.testing.assert_array_equal(sown["input"].get_value()[0], X)


def test_the_context_inside_a_gradient_of_a_closed_over_model() -> None:
    mdl = Derived()

    def loss(x: jax.Array) -> tuple[jax.Array, nnx.State]:
        return nnx_bridge.capture(mdl, nnx.Intermediate)(x)

    with strict():
        grad, _ = jax.grad(loss, has_aux=True)(1.0)
    assert grad == 2.0


@pytest.mark.parametrize("capture", [nnx_bridge.capture, nnx.capture])
def test_a_lifted_transform_inside_records_what_a_plain_call_records(capture: Any) -> None:
    def transformed(mdl: Block, x: jax.Array) -> Any:
        return lifted.jvp(lambda mdl, x: mdl(x), mdl, (x,), (x,), {})

    _, expected = nnx.capture(block(), nnx.Intermediate)(X)
    with strict():
        _, sown = capture(transformed, nnx.Intermediate)(block(), X)
    assert_trees_equal(sown, expected)


def test_as_a_decorator() -> None:
    @nnx_bridge.capture(nnx.Intermediate)
    def forward(mdl: Block, x: jax.Array) -> jax.Array:
        return mdl(x)

    assert list(forward(block(), X)[1]) == ["input"]


def test_what_is_no_module_is_named() -> None:
    with pytest.raises(TypeError, match="first argument .* must be an nnx.Module, got int"):
        nnx_bridge.capture(lambda x: x, nnx.Intermediate)(3)


@pytest.mark.parametrize("transform", [jax.vmap, jax.jit, jax.jacfwd])
def test_a_jax_transform_that_closes_over_the_module(transform: Callable[..., Any]) -> None:
    class Sower(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow(nnx.Intermediate, "x", x)
            return x

    call = lambda mdl, x: transform(lambda x: mdl(x))(x)  # noqa: E731
    with pytest.raises(TraceContextError, match="'x' is recorded inside a JAX transform"):
        nnx_bridge.capture(call, nnx.Intermediate)(Sower(), normal(3))


def test_a_broadcast_module_needs_an_axis_for_what_it_records() -> None:
    def mapped(axes: Any) -> Callable[..., Any]:
        model = block()
        model.eval()
        call = nnx.vmap(lambda mdl, x: mdl(x), in_axes=(axes, 0))
        types = (nnx.Intermediate, nnx.Perturbation)
        return lambda x: nnx_bridge.capture(call, *types)(model, x)

    x = normal(5, 2, 3)
    with pytest.raises(ValueError) as caught:
        mapped(None)(x)
    assert "Say where the mapped axis of recorded values goes" in "".join(caught.value.__notes__)
    _, sown, zeros = mapped(nnx.StateAxes({(nnx.Intermediate, nnx.Perturbation): 0, ...: None}))(x)
    assert_trees_equal(sown["input"].get_value(), (x,))
    assert zeros["hidden"].get_value().shape == x.shape


@pytest.mark.parametrize("capture", [nnx_bridge.capture, nnx.capture])
def test_a_lifted_transform_inside_a_model_with_lists(capture: Any) -> None:
    """`nnx.capture` keeps what an `nnx.List` would sow among the items of the list."""

    class Listed(nnx.Module):
        def __init__(self) -> None:
            self.blocks = nnx.List([block(), block()])

        def __call__(self, x: jax.Array) -> jax.Array:
            return sum(b(x).sum() for b in self.blocks)

    grads = lambda mdl, x: lifted.grad(lambda m, x: m(x), mdl, x, grad_variables="params")  # noqa: E731
    _, expected = nnx.capture(Listed(), nnx.Intermediate)(X)
    _, sown = capture(grads, nnx.Intermediate)(Listed(), X)
    assert_trees_equal(sown, expected)


# Control flow. Every branch records the same; a loop whose body records has no fixed structure in
# JAX, with or without us.


def _branches(name: str, fn: Any) -> Callable[..., Any]:
    if name == "cond":
        return lambda mdl, x: nnx.cond(x.sum() > -99, fn, lambda m, x: fn(m, 2 * x), mdl, x)
    return lambda mdl, x: nnx.switch(1, [lambda m, x: fn(m, 2 * x), fn], mdl, x)


@pytest.mark.parametrize("capture", [nnx_bridge.capture, nnx.capture])
@pytest.mark.parametrize("place", ["inside", "around"])
@pytest.mark.parametrize("name", ["cond", "switch"])
def test_a_lifted_transform_and_branches(name: str, place: str, capture: Any) -> None:
    forward = lambda mdl, x: mdl(x)  # noqa: E731
    lifted_ = lambda fn: lambda mdl, x: lifted.jvp(fn, mdl, (x,), (x,), {})  # noqa: E731
    compose = {
        "inside": _branches(name, lifted_(forward)),
        "around": lifted_(_branches(name, forward)),
    }
    expected = nnx_bridge.capture_jvp(forward, block(), (X,), (X,))
    mdl = block()
    (value, tangent), sown = capture(compose[place], nnx.Intermediate)(mdl, X)
    assert_trees_close(
        (value, tangent, sown), (expected.value, expected.tangent, expected.intermediates)
    )
    plain = block()
    plain.norm(plain.dense(X))
    assert_trees_close(nnx.state(mdl), nnx.state(plain))


def test_loops_inside_a_context_over_what_records_outside_of_them() -> None:
    class Iterated(nnx.Module):
        def __init__(self) -> None:
            self.step = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow(nnx.Intermediate, "input", x)
            x = self.perturb("start", x)
            body = lambda i, c: (c[0], jnp.tanh(c[0](c[1])))  # noqa: E731
            return nnx.fori_loop(0, 3, body, (self.step, x))[1].sum()

    mdl = Iterated()
    result = nnx_bridge.capture_grad(lambda mdl, x: mdl(x), mdl, X)
    assert_trees_equal(result.intermediates["input"].get_value(), (X,))
    assert_trees_equal(result.intermediate_grads["start"].get_value(), result.grads[1])
    step = lambda x: jnp.tanh(mdl.step(x))  # noqa: E731
    assert_trees_close(result.grads[1], jax.grad(lambda x: step(step(step(x))).sum())(X))


class Compiled(Base):
    @nnx.jit
    def __call__(self, x: jax.Array) -> jax.Array:
        return 2 * self.features(x)


def test_outputs_of_compiled_methods_are_sown() -> None:
    capture = nnx_bridge.capture(Compiled(), nnx.Intermediate, method_outputs=nnx.Intermediate)
    for _ in range(2):
        _, sown = capture(jnp.ones(2))
        assert "__call__" in sown

"""Capture contexts around hosted models: what Linen sows and perturbs is recorded as NNX's is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import lifted
import nnx_bridge
from tests.helpers import assert_trees_close, assert_trees_equal, normal, strict, total

X = normal(4, 3)


class Tap(nn.Module):
    """Sows and perturbs, and has no variables."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow("intermediates", "input", x)
        return self.perturb("output", jnp.tanh(x))


class Net(nn.Module):
    """Taps at several levels, one of them called twice."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        tap = Tap()
        x = self.perturb("hidden", tap(nn.Dense(3)(x)))
        self.sow("intermediates", "norm", jnp.linalg.norm(x))
        self.sow(
            "intermediates", "sum", x, init_fn=lambda: 0.0, reduce_fn=lambda old, new: old + new
        )
        return nn.Dense(2)(x)


def hosted(module: nn.Module | None = None) -> nnx_bridge.Host:
    return nnx_bridge.Host.init(module or Net(), jax.random.key(0), X)


def with_unknown_nodes() -> nnx_bridge.Host:
    """A host whose taps, which have no variables, become nodes in the first call."""
    module, variables = nnx_bridge.unhost(hosted())
    return nnx_bridge.Host(module, {"params": variables["params"]})


def bound(host: nnx_bridge.Host) -> nn.Module:
    module, variables = nnx_bridge.unhost(host)
    return module.bind({"params": variables.get("params", {})})


def pure(tree: Any) -> Any:
    return nnx.to_pure_dict(tree)


def test_the_example_of_perturb() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x2 = self.perturb("grad_of_x", x)
            return 3 * x2

    model = nnx_bridge.Host.init(Model(), jax.random.key(0), 1.0)
    x = 1.0
    forward = nnx_bridge.capture(model, nnx.Perturbation)
    _, perturbations = forward(x)

    def train_step(model: Any, perturbations: Any, x: Any) -> Any:
        def loss(model: Any, perturbations: Any, x: Any) -> Any:
            return nnx_bridge.capture(model, nnx.Intermediate, init=perturbations)(x)

        (_, perturb_grads), sowed = nnx.grad(loss, argnums=(0, 1), has_aux=True)(
            model, perturbations, x
        )
        return nnx.merge_state(perturb_grads, sowed)

    metrics = train_step(model, perturbations, x)
    assert metrics["grad_of_x"].get_value() == 3.0


def test_the_example_of_sow() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, add: float = 0) -> jax.Array:
            x = nn.Dense(3)(x)
            self.sow("intermediates", "i", x + add)
            return nn.Dense(4)(x)

    model = nnx_bridge.Host.init(Model(), jax.random.key(0), jnp.ones((1, 2)))
    x = jnp.ones((1, 2))
    assert not hasattr(model, "i")

    def twice(model: Any, x: jax.Array) -> Any:
        return model(x), model(x, add=1)

    _, sown = nnx_bridge.capture(twice, nnx.Intermediate)(model, x)
    values = sown["i"].get_value()
    assert len(values) == 2
    assert (values[0] + 1 == values[1]).all()
    assert not hasattr(model, "i")


def test_values_and_gradients_are_those_of_the_linen_module() -> None:
    host = hosted()
    with strict():
        actual = nnx_bridge.capture_grad(total, host, X)
        expected = nnx_bridge.capture_grad(total, bound(host), X)
    assert_trees_equal(actual.value, expected.value)
    assert_trees_equal(pure(actual.intermediates), expected.intermediates)
    assert_trees_equal(pure(actual.intermediate_grads), expected.intermediate_grads)
    assert set(pure(actual.intermediate_grads)) == {"hidden", "Tap_0"}


def test_tangents_of_what_is_sown_are_those_of_the_linen_module() -> None:
    host = hosted()
    call = lambda mdl, x: mdl(x)  # noqa: E731
    actual = nnx_bridge.capture_jvp(call, host, (X,), (X,))
    expected = nnx_bridge.capture_jvp(call, bound(host), (X,), (X,))
    assert_trees_equal(pure(actual.intermediate_tangents), expected.intermediate_tangents)


@pytest.mark.parametrize("capture", [nnx.capture, nnx_bridge.capture], ids=["flax", "ours"])
def test_either_context_records(capture: Callable[..., Any]) -> None:
    host = hosted()
    y, sown = capture(host, nnx.Intermediate)(X)
    module, variables = nnx_bridge.unhost(host)
    expected, updates = module.apply({"params": variables["params"]}, X, mutable=["intermediates"])
    assert_trees_equal(y, expected)
    assert_trees_equal(pure(sown), updates["intermediates"])


def test_a_dictionary_is_perturbed_as_a_whole() -> None:
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            pair = self.perturb("pair", {"a": x, "b": x**2})
            return pair["a"] * pair["b"]

    host = hosted(Pair())
    result = nnx_bridge.capture_grad(total, host, X)
    expected = nnx_bridge.capture_grad(total, bound(host), X)
    grads = result.intermediate_grads["pair"].get_value()
    assert_trees_equal(grads, expected.intermediate_grads["pair"])


def test_a_node_that_was_not_there_is_found_by_seeds_and_records() -> None:
    host = with_unknown_nodes()
    assert not hasattr(host, "Tap_0")
    actual = nnx_bridge.capture_grad(total, host, X)
    expected = nnx_bridge.capture_grad(total, bound(host), X)
    assert_trees_equal(pure(actual.intermediate_grads), expected.intermediate_grads)
    assert "__captures__" not in vars(host.Tap_0)


def test_a_node_that_a_context_has_found_is_not_marked() -> None:
    host = with_unknown_nodes()
    nnx_bridge.capture(host, nnx.Intermediate)(X)
    assert "__captures__" not in vars(host.Tap_0)


def test_a_node_that_an_inner_context_has_found_records_in_the_outer_one() -> None:
    def twice(mdl: Any, x: jax.Array) -> Any:
        _, inner = nnx_bridge.capture(mdl, nnx.Intermediate)(x)
        return mdl(x), inner

    (_, inner), outer = nnx_bridge.capture(twice, nnx.Intermediate)(with_unknown_nodes(), X)
    assert_trees_equal(pure(outer), pure(inner))


def test_outputs_of_methods_are_those_that_linen_captures() -> None:
    host = hosted()
    actual = nnx_bridge.capture_grad(total, host, X, capture_intermediates=True)
    expected = nnx_bridge.capture_grad(total, bound(host), X, capture_intermediates=True)
    assert_trees_equal(pure(actual.intermediates), expected.intermediates)
    assert "__call__" in expected.intermediates["Dense_0"]


def test_a_host_in_an_nnx_module() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.hosts = nnx.List([hosted()])
            self.head = nnx.Linear(2, 1, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.head(self.perturb("features", self.hosts[0](x)))

    model = Model()
    result = nnx_bridge.capture_grad(total, model, X)
    alone = nnx_bridge.capture_grad(
        lambda mdl, x: total(lambda x: model.head(mdl(x)), x), bound(model.hosts[0]), X
    )
    grads = pure(result.intermediate_grads)
    assert_trees_close(grads["hosts"][0], alone.intermediate_grads)
    assert grads["features"].shape == (4, 2)


@pytest.mark.parametrize("wrap", [nnx.jit, nnx.remat], ids=["jit", "remat"])
def test_a_transform_between_the_context_and_the_host(wrap: Callable[..., Any]) -> None:
    host = hosted()
    call = wrap(lambda mdl, x: mdl(x))
    _, sown, zeros = nnx_bridge.capture(call, nnx.Intermediate, nnx.Perturbation)(host, X)
    _, expected = nnx_bridge.capture(host, nnx.Intermediate)(X)
    assert_trees_close(pure(sown), pure(expected))
    assert_trees_equal(pure(zeros), jax.tree.map(jnp.zeros_like, pure(zeros)))


def test_a_lifted_transform_in_the_context() -> None:
    host = hosted()
    loss = lambda mdl, x: lifted.grad(total, mdl, x)[0]  # noqa: E731
    with strict():
        grad, sown = nnx_bridge.capture(loss, nnx.Intermediate)(host, X)
        _, expected = nnx_bridge.capture(host, nnx.Intermediate)(X)
    assert_trees_close(grad, lifted.grad(total, bound(host), X)[0])
    assert_trees_close(pure(sown), pure(expected))


def test_statistics_move_while_values_are_recorded() -> None:
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            y = nn.BatchNorm(use_running_average=False)(x)
            self.sow("intermediates", "y", y)
            return y

    host, plain = hosted(Norm()), hosted(Norm())
    nnx_bridge.capture(host, nnx.Intermediate)(X)
    plain(X)
    assert_trees_equal(pure(nnx.state(host)), pure(nnx.state(plain)))


def test_an_exception_leaves_no_mark() -> None:
    class Failing(nn.Module):
        fails: bool

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow("intermediates", "x", x)
            if self.fails and not self.is_initializing():
                raise RuntimeError("on purpose")
            return x

    host = hosted(Failing(True))
    before = nnx.graphdef(host)
    with pytest.raises(RuntimeError, match="on purpose"):
        nnx_bridge.capture(host, nnx.Intermediate)(X)
    assert nnx.graphdef(host) == before


def test_outside_of_a_context_perturbations_do_nothing() -> None:
    host = hosted()
    module, variables = nnx_bridge.unhost(host)
    assert_trees_equal(host(X), module.apply({"params": variables["params"]}, X))


def test_a_seed_for_a_module_that_is_not_there() -> None:
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    seeds = nnx.from_flat_state([(("layres", 0, "p"), nnx.Perturbation(jnp.zeros(2)))])
    with pytest.raises(ValueError, match="init: layres/0/p: Sequential has no module at 'layres'"):
        nnx_bridge.capture(model, nnx.Intermediate, init=seeds)(X)

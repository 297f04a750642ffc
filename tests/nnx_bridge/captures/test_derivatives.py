"""Derivatives of what is sown and perturbed: Flax's recipe, raw JAX, and Linen against NNX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import nnx_bridge
from tests.helpers import assert_trees_close, assert_trees_equal, normal, strict


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.Dense(3, name="dense")(x)
        self.sow("intermediates", "hidden", h)
        h = nn.BatchNorm(use_running_average=False, name="norm")(h)
        h = self.perturb("normed", jnp.tanh(h))
        pair = self.perturb("pair", {"a": h, "b": h**2})
        return nn.Dense(2, name="out")(pair["a"] + pair["b"])


class Native(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.out = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.dense(x)
        self.sow(nnx.Intermediate, "hidden", h)
        h = self.perturb("normed", jnp.tanh(self.norm(h)))
        pair = self.perturb("pair", {"a": h, "b": h**2})
        return self.out(pair["a"] + pair["b"])


class Plain(nnx.Module):
    """Perturbs arrays only, as Flax's own recipe needs."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.perturb("hidden", jnp.tanh(self.dense(x)))
        self.sow(nnx.Intermediate, "square", h**2)
        return jnp.sin(h)


X = normal(5, 4)


def loss(mdl: Any, x: jax.Array) -> jax.Array:
    return (mdl(x) ** 2).sum()


def native() -> Native:
    return Native(nnx.Rngs(0))


def linen() -> nn.Module:
    variables = nnx_bridge.to_variables(nnx.state(native()))
    return Linen().bind(variables, mutable=["batch_stats"])


def recipe(mdl: nnx.Module, x: jax.Array) -> Any:
    """The four steps of the documentation of `nnx.Module.perturb`."""
    _, perturbations = nnx.capture(mdl, nnx.Perturbation)(x)

    def perturbed(mdl: nnx.Module, perturbations: nnx.State, x: jax.Array) -> Any:
        return nnx.capture(loss, nnx.Intermediate, init=perturbations)(mdl, x)

    return nnx.grad(perturbed, argnums=(0, 1, 2), has_aux=True)(mdl, perturbations, x)


def test_one_call_gives_what_the_recipe_gives() -> None:
    (params, perturbed, inputs), sown = recipe(Plain(nnx.Rngs(0)), X)
    with strict():
        result = nnx_bridge.capture_grad(loss, Plain(nnx.Rngs(0)), X)
    assert_trees_equal(result.grads, (params, inputs))
    assert_trees_equal(result.intermediate_grads, perturbed)
    assert_trees_equal(result.intermediates, sown)


def test_linen_and_nnx_give_equal_trees() -> None:
    with strict():
        of_linen = nnx_bridge.capture_grad(loss, linen(), X, capture_intermediates=True)
        of_nnx = nnx_bridge.capture_grad(loss, native(), X, capture_intermediates=True)
    assert_trees_equal(of_nnx.value, of_linen.value)
    for name in ("intermediates", "intermediate_grads"):
        assert_trees_equal(nnx.to_pure_dict(getattr(of_nnx, name)), getattr(of_linen, name))
    assert_trees_equal(nnx_bridge.to_variables(of_nnx.grads[0]), of_linen.grads[0])


def test_a_gradient_of_a_perturbed_value_is_that_of_raw_jax() -> None:
    mdl = Plain(nnx.Rngs(0))
    hidden = jnp.tanh(mdl.dense(X))
    expected = jax.grad(lambda h: (jnp.sin(h) ** 2).sum())(hidden)
    result = nnx_bridge.capture_grad(loss, mdl, X)
    assert_trees_close(result.intermediate_grads["hidden"].get_value(), expected)


def test_statistics_of_nnx_are_those_of_a_plain_call() -> None:
    captured, plain = native(), native()
    nnx_bridge.capture_grad(loss, captured, X)
    plain.norm(plain.dense(X))
    assert_trees_equal(nnx.state(captured), nnx.state(plain))


def test_statistics_of_linen_are_those_of_a_plain_call() -> None:
    captured, plain = linen(), linen()
    nnx_bridge.capture_grad(loss, captured, X)
    plain(X)
    assert_trees_equal(captured.variables["batch_stats"], plain.variables["batch_stats"])


@pytest.mark.parametrize("make", [linen, native])
def test_tangents_of_sown_values(make: Any) -> None:
    mdl, t_x = make(), normal(5, 4, seed=7)
    kernel = normal(4, 3, seed=8)
    tangents = {"params": {"dense": {"kernel": kernel}}}
    with strict():
        result = nnx_bridge.capture_jvp(lambda mdl, x: mdl(x), mdl, (X,), (t_x,), tangents)
    dots = result.intermediate_tangents
    dots = nnx.to_pure_dict(dots) if isinstance(dots, nnx.State) else dots
    params = nnx_bridge.to_variables(nnx.state(native()))["params"]["dense"]
    assert_trees_close(dots["hidden"][0], t_x @ params["kernel"] + X @ kernel, factor=4)


def test_inside_init_and_apply_of_a_linen_model() -> None:
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            result = nnx_bridge.capture_grad(loss, Linen(name="inner"), x)
            return result.intermediate_grads, result.intermediates

    with strict():
        out, variables = Outer().init_with_output(jax.random.key(0), X)
    assert set(variables) == {"params", "batch_stats"}
    applied, _ = Outer().apply(variables, X, mutable=["batch_stats"])
    assert jax.tree.structure(out) == jax.tree.structure(applied)


def test_argnums_and_aux() -> None:
    def with_aux(mdl: Any, x: jax.Array, scale: jax.Array) -> Any:
        return scale * loss(mdl, x), "aux"

    mdl = Plain(nnx.Rngs(0))
    result = nnx_bridge.capture_grad(
        with_aux, mdl, X, 2.0, has_aux=True, argnums=1, grad_variables=False
    )
    assert result.aux == "aux"
    assert_trees_close(result.grads, nnx.capture(loss)(Plain(nnx.Rngs(0)), X))


class Wary(nnx.Module):
    """Perturbs more where it sees its statistic."""

    def __init__(self) -> None:
        self.scale, self.seen = nnx.Param(jnp.float32(2)), nnx.BatchStat(jnp.float32(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.perturb("twice", x) if hasattr(self, "seen") else x
        return self.perturb("once", self.scale[...] * x)


@pytest.mark.parametrize("variables", ["params", True])
def test_what_is_perturbed_is_what_the_visible_variables_lead_to(variables: Any) -> None:
    result = nnx_bridge.capture_grad(lambda mdl, x: mdl(x), Wary(), 3.0, variables=variables)
    assert set(result.intermediate_grads) == {"once"} | ({"twice"} if variables is True else set())


def test_the_program_has_one_forward_pass() -> None:
    graphdef, state = nnx.split(Plain(nnx.Rngs(0)))

    def captured(state: nnx.State, x: jax.Array) -> Any:
        result = nnx_bridge.capture_grad(loss, nnx.merge(graphdef, state), x)
        return result.value, result.intermediate_grads

    assert str(jax.make_jaxpr(captured)(state, X)).count("tanh") == 1


def test_a_module_without_parameters_and_perturbations() -> None:
    class Sine(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.sin(x)

    result = nnx_bridge.capture_grad(lambda mdl, x: mdl(x), Sine(), 1.0)
    assert_trees_equal(result.grads[1], jax.grad(jnp.sin)(1.0))
    assert not result.intermediates and not result.intermediate_grads


def test_a_scalar_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"fn must return a scalar, got float32\[5,2\]"):
        nnx_bridge.capture_grad(lambda mdl, x: mdl(x), native(), X)

"""Eight devices: hosts, optimizers and captures leave arrays where they are, and move nothing that
the program of Linen or raw JAX does not move."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import nnx_bridge
from nnx_bridge import Host
from tests.helpers import assert_trees_close, assert_trees_equal
from tests.sharding.matrix import (
    KINDS,
    MLP,
    Setting,
    assert_as_by_hand,
    layouts,
    needs_8_devices,
    placed,
    raw,
    settings,
    unplaced,
)

pytestmark = needs_8_devices
TX = optax.adam(1e-2)


@functools.cache
def _on_one_device(fn: Callable[..., Any]) -> list[Any]:
    return jax.tree.leaves(jax.jit(functools.partial(fn, Setting()))(*unplaced()))


# Hosts.


@settings
def test_variables_of_a_host_are_made_in_their_places(setting: Setting) -> None:
    def put(params: Any) -> Any:
        explicit = setting.mode == "explicit"
        return jax.sharding.reshard(params, setting.places) if explicit else params

    def hosted(x: jax.Array) -> Any:
        model = Host.init(MLP(setting), setting.key(), x)
        return put(nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    def linen(x: jax.Array) -> Any:
        return put(MLP(setting).init(setting.key(), x)["params"])

    _, x, _ = placed(setting)
    found = assert_as_by_hand(setting, hosted, linen, (x,), ["down", "up"])
    if setting.mode != "shard_map":
        params = jax.jit(MLP().init)(jax.random.key(0), unplaced()[1])["params"]
        assert_trees_close(found, jax.tree.leaves(params))


@layouts
def test_a_host_takes_and_gives_the_arrays_themselves(setting: Setting) -> None:
    params, x, _ = placed(setting)
    with jax.set_mesh(setting.mesh):
        model = Host(MLP(setting), {"params": params})
        model(x)
        nnx.grad(lambda model, x: jnp.mean(model(x) ** 2))(model, x)
    _, variables = nnx_bridge.unhost(model)
    state = nnx_bridge.to_variables(nnx_bridge.to_state({"params": params}))
    for leaves in (jax.tree.leaves(variables), jax.tree.leaves(state)):
        assert [a is b for a, b in zip(leaves, jax.tree.leaves(params), strict=True)] == [True] * 2


# Training.


def _trained(setting: Setting, params: Any, x: jax.Array, _: Any) -> Any:
    """Two steps, as of Linen."""
    moments = TX.init(params)
    for _ in range(2):
        gradient = jax.grad(lambda params: setting.mean(raw(setting, params, x)[0] ** 2))
        updates, moments = TX.update(gradient(params), moments, params)
        params = optax.apply_updates(params, updates)
    return params, moments[0].mu, moments[0].nu


def _trained_in_nnx(setting: Setting, kind: str, params: Any, x: jax.Array, _: Any) -> Any:
    model = KINDS[kind](setting, params)
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    for _ in range(2):
        gradient = nnx.grad(lambda model: setting.mean(model(x) ** 2))
        optimizer.update(model, gradient(model))
    adam = optimizer.opt_state[0]
    return [nnx.to_pure_dict(nnx.state(tree)) for tree in (model, adam.mu, adam.nu)]


@pytest.mark.parametrize("kind", ["NNX", "host"])
@settings
def test_training_is_that_of_linen(setting: Setting, kind: str) -> None:
    ours = functools.partial(_trained_in_nnx, setting, kind)
    linen = functools.partial(_trained, setting)
    found = assert_as_by_hand(setting, ours, linen, placed(setting), 3 * ["down", "up"])
    # Adam divides by the root of what may be as small as a rounding.
    assert_trees_close(found, _on_one_device(_trained), factor=64)


@layouts
def test_training_goes_on_where_it_began(setting: Setting) -> None:
    params, x, _ = placed(setting)
    traces: dict[str, int] = {"host": 0, "Linen": 0}

    def loss(model: Host, x: jax.Array) -> jax.Array:
        return jnp.mean(model(x) ** 2)

    @nnx.jit
    def step(model: Host, optimizer: nnx.Optimizer[Any], x: jax.Array) -> None:
        traces["host"] += 1
        optimizer.update(model, nnx.grad(loss)(model, x))

    @jax.jit
    def linen_step(params: Any, moments: Any, x: jax.Array) -> Any:
        traces["Linen"] += 1
        gradient = jax.grad(lambda params: jnp.mean(raw(setting, params, x)[0] ** 2))
        updates, moments = TX.update(gradient(params), moments, params)
        return optax.apply_updates(params, updates), moments

    with jax.set_mesh(setting.mesh):
        model = Host(MLP(setting), {"params": params})
        optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
        moments = TX.init(params)
        for _ in range(4):
            step(model, optimizer, x)
            params, moments = linen_step(params, moments, x)
    # JAX may trace the second step anew, as the counter of Adam is on the mesh then.
    assert traces["host"] == traces["Linen"] <= 2
    assert_trees_equal(nnx.to_pure_dict(nnx.state(model)), params)
    for tree in (model, optimizer.opt_state[0].mu, optimizer.opt_state[0].nu):
        found = nnx.to_pure_dict(nnx.state(tree))
        alike = lambda x, place: x.sharding.is_equivalent_to(place, x.ndim)  # noqa: E731
        assert jax.tree.all(jax.tree.map(alike, found, setting.places))


# Captures.


def _capture_grad(setting: Setting, mdl: Any, x: jax.Array, v: Any) -> Any:
    loss = lambda mdl, x: setting.mean(mdl(x) ** 2)  # noqa: E731
    found = nnx_bridge.capture_grad(loss, mdl, x)
    return found.value, found.intermediates, found.grads, found.intermediate_grads


def _grad_by_hand(setting: Setting, params: Any, x: jax.Array, v: Any) -> Any:
    def loss(params: Any, x: jax.Array, seed: jax.Array) -> Any:
        y, h = raw(setting, params, x, seed)
        return setting.mean(y**2), h

    seed = jnp.zeros_like(jax.eval_shape(lambda: raw(setting, params, x)[1]))
    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, x, seed)


def _capture_jvp(setting: Setting, mdl: Any, x: jax.Array, v: Any) -> Any:
    found = nnx_bridge.capture_jvp(lambda mdl, x: mdl(x), mdl, (x,), (x,), {"params": v})
    return found.value, found.intermediates, found.tangent, found.intermediate_tangents


def _jvp_by_hand(setting: Setting, params: Any, x: jax.Array, v: Any) -> Any:
    return jax.jvp(functools.partial(raw, setting), (params, x), (v, x))


CAPTURES: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[str]]] = {
    "grad": (
        _capture_grad,
        _grad_by_hand,
        ["scalar", "hidden", "down", "up", "batch", "hidden"],
    ),
    "jvp": (_capture_jvp, _jvp_by_hand, 2 * ["batch", "hidden"]),
}


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("kind", KINDS)
@settings
def test_captures(setting: Setting, kind: str, capture: str) -> None:
    in_context, by_hand, outs = CAPTURES[capture]

    def ours(params: Any, x: jax.Array, v: Any) -> Any:
        return in_context(setting, KINDS[kind](setting, params), x, v)

    programs = ours, functools.partial(by_hand, setting)
    found = assert_as_by_hand(setting, *programs, placed(setting), outs)
    assert_trees_close(found, _on_one_device(by_hand))

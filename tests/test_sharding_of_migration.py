"""Eight devices: hosts, optimizers and captures leave arrays where they are,
and move nothing that the program of Linen or raw JAX does not move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

import nnx_bridge
from nnx_bridge import Host
from tests.helpers import assert_trees_equal, normal
from tests.sharding import (
    LAYOUTS,
    MLP,
    WIDTH,
    assert_same_compiled,
    moves,
    needs_8_devices,
    placed,
    shardings,
)

pytestmark = needs_8_devices
layouts = pytest.mark.parametrize("layout", LAYOUTS)
TX = optax.adam(1e-2)


def _loss(mdl: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(mdl(x) ** 2)


def _raw_loss(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(MLP().apply({"params": params}, x) ** 2)


def _shardings(tree: Any) -> list[Any]:
    return [x.sharding for x in jax.tree.leaves(tree)]


@layouts
def test_variables_of_a_host_are_made_in_their_places(layout: str) -> None:
    places, batch = shardings(layout)
    x = jax.device_put(normal(16, WIDTH), batch)
    key = jax.random.key(0)

    def hosted(x: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(Host.init(MLP(), key, x), nnx.Param))

    def linen(x: jax.Array) -> Any:
        return MLP().init(key, x)["params"]

    ours, raw = (jax.jit(fn, out_shardings=places).lower(x).compile() for fn in (hosted, linen))
    assert moves(ours) == moves(raw)
    assert _shardings(ours(x)) == jax.tree.leaves(places)
    assert_trees_equal(ours(x), raw(x))


@layouts
def test_a_host_takes_and_gives_the_arrays_themselves(layout: str) -> None:
    params, x, _ = placed(layout)
    model = Host(MLP(), {"params": params})
    model(x)
    nnx.grad(_loss)(model, x)
    _, variables = nnx_bridge.unhost(model)
    state = nnx_bridge.to_variables(nnx_bridge.to_state({"params": params}))
    for leaves in (jax.tree.leaves(variables), jax.tree.leaves(state)):
        assert [a is b for a, b in zip(leaves, jax.tree.leaves(params), strict=True)] == [True] * 2


def _hosted_step(params: Any) -> tuple[Any, Callable[..., Any]]:
    model = Host(MLP(), {"params": params})
    graphdef, state = nnx.split((model, nnx.Optimizer(model, TX, wrt=nnx.Param)))

    def step(state: Any, x: jax.Array) -> Any:
        model, optimizer = nnx.merge(graphdef, state)
        loss, grads = nnx.value_and_grad(_loss)(model, x)
        optimizer.update(model, grads)
        adam = optimizer.opt_state[0]
        moments = [nnx.to_pure_dict(nnx.state(tree)) for tree in (adam.mu, adam.nu)]
        return loss, nnx.to_pure_dict(nnx.state(model)), *moments

    return state, step


def _linen_step(params: Any) -> tuple[Any, Callable[..., Any]]:
    def step(state: Any, x: jax.Array) -> Any:
        params, moments = state
        loss, grads = jax.value_and_grad(_raw_loss)(params, x)
        updates, moments = TX.update(grads, moments, params)
        return loss, optax.apply_updates(params, updates), moments[0].mu, moments[0].nu

    return (params, TX.init(params)), step


@pytest.mark.parametrize(
    ("layout", "kind"),
    # With other layouts in types JAX asks for `out_sharding=` in the products, of raw JAX as well.
    [*((layout, AxisType.Auto) for layout in LAYOUTS), ("data", AxisType.Explicit)],
)
def test_a_step_of_training_is_that_of_linen(layout: str, kind: AxisType) -> None:
    params, x, _ = placed(layout, kind)
    with jax.set_mesh(x.sharding.mesh):
        programs, results = [], []
        for state, step in (_hosted_step(params), _linen_step(params)):
            programs.append(jax.jit(step).lower(state, x).compile())
            results.append(jax.tree.leaves(programs[-1](state, x)))
    assert moves(programs[0]) == moves(programs[1])
    assert _shardings(results[0]) == _shardings(results[1])
    assert_trees_equal(*results)


@layouts
def test_training_goes_on_where_it_began(layout: str) -> None:
    params, x, _ = placed(layout)
    model = Host(MLP(), {"params": params})
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    traces: dict[str, int] = {"host": 0, "Linen": 0}

    @nnx.jit
    def step(model: Host, optimizer: nnx.Optimizer[Any], x: jax.Array) -> None:
        traces["host"] += 1
        optimizer.update(model, nnx.grad(_loss)(model, x))

    @jax.jit
    def linen_step(params: Any, moments: Any, x: jax.Array) -> Any:
        traces["Linen"] += 1
        updates, moments = TX.update(jax.grad(_raw_loss)(params, x), moments, params)
        return optax.apply_updates(params, updates), moments

    before = _shardings(params)
    moments = TX.init(params)
    for _ in range(4):
        step(model, optimizer, x)
        params, moments = linen_step(params, moments, x)
    # JAX traces the second step anew, as the counter of Adam is on the mesh then.
    assert traces["host"] == traces["Linen"] == 2
    adam = optimizer.opt_state[0]
    assert [_shardings(nnx.state(x)) for x in (model, adam.mu, adam.nu)] == 3 * [before]
    assert_trees_equal(nnx.to_pure_dict(nnx.state(model)), params)


class Recorded(nn.Module):
    """`MLP`, with what is between its layers sown and perturbed."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = jnp.tanh(nn.Dense(WIDTH, use_bias=False, name="up")(x))
        h = self.perturb("hidden", h)
        self.sow("intermediates", "hidden", h)
        return nn.Dense(WIDTH, use_bias=False, name="down")(h)


def _recorded(params: Any, x: jax.Array, seed: Any = 0.0) -> tuple[jax.Array, jax.Array]:
    h = jnp.tanh(x @ params["up"]["kernel"]) + seed
    return h @ params["down"]["kernel"], h


def _capture_grad(params: Any, x: jax.Array, _: Any) -> Any:
    model = Host(Recorded(), {"params": params})
    found = nnx_bridge.capture_grad(_loss, model, x, argnums=())
    return found.value, found.intermediates, found.grads, found.intermediate_grads


def _raw_capture_grad(params: Any, x: jax.Array, _: Any) -> Any:
    def loss(params: Any, seed: jax.Array) -> Any:
        y, h = _recorded(params, x, seed)
        return jnp.mean(y**2), h

    seed = jnp.zeros(x.shape)
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, seed)


def _capture_jvp(params: Any, x: jax.Array, v: Any) -> Any:
    model = Host(Recorded(), {"params": params})
    found = nnx_bridge.capture_jvp(lambda mdl, x: mdl(x), model, (x,), (x,), {"params": v})
    return found.value, found.intermediates, found.tangent, found.intermediate_tangents


def _raw_capture_jvp(params: Any, x: jax.Array, v: Any) -> Any:
    return jax.jvp(_recorded, (params, x), (v, x))


@layouts
@pytest.mark.parametrize(
    ("capture", "raw"),
    [(_capture_grad, _raw_capture_grad), (_capture_jvp, _raw_capture_jvp)],
    ids=["grad", "jvp"],
)
def test_captures(layout: str, capture: Any, raw: Any) -> None:
    assert_same_compiled(capture, raw, *placed(layout))

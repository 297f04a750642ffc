"""Eight devices: every transform of `lifted` gives the numbers of one device, leaves the results
where they belong, and moves no array that the program by hand does not move."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import lifted
from tests.helpers import assert_trees_close
from tests.sharding.matrix import (
    KINDS,
    LAYOUTS,
    Setting,
    assert_as_by_hand,
    moves,
    needs_8_devices,
    placed,
    raw,
    settings,
    unplaced,
)

pytestmark = needs_8_devices

Args = tuple[Any, jax.Array, Any]  # The parameters, a batch, a tangent of the parameters.


class Case(NamedTuple):
    """A transform: ours on a module, and that of JAX by hand; and what the leaves of the result
    are."""

    ours: Callable[[Setting, Any, jax.Array, Any], Any]
    by_hand: Callable[[Setting, Any, jax.Array, Any], Any]
    outs: str


def _call(mdl: Any, x: jax.Array) -> jax.Array:
    return mdl(x)


def _loss(setting: Setting) -> Callable[[Any, jax.Array], jax.Array]:
    return lambda mdl, x: setting.mean(mdl(x) ** 2)


def _grad(setting: Setting, mdl: Any, x: jax.Array, v: Any) -> Any:
    return lifted.value_and_grad(_loss(setting), mdl, x, grad_variables="params")


def _vjp(setting: Setting, mdl: Any, x: jax.Array, v: Any) -> Any:
    both = lambda mdl, x: (mdl(x), x * x)  # noqa: E731
    (y, _), bwd = lifted.vjp(both, mdl, x, vjp_variables="params")
    return y, bwd((y, None))  # Without a cotangent of the second output.


def _jvp(setting: Setting, mdl: Any, x: jax.Array, v: Any) -> Any:
    return lifted.jvp(_call, mdl, (x,), (x,), {"params": {"down": v["down"]}})


def _linearize(setting: Setting, mdl: Any, x: jax.Array, v: Any) -> Any:
    y, f_jvp = lifted.linearize(_call, mdl, x, grad_variables="params")
    return y, f_jvp({"params": v}, x), f_jvp({"params": {"up": v["up"]}}, None)


def _hvp(setting: Setting, mdl: Any, x: jax.Array, v: Any) -> Any:
    return lifted.hvp(_loss(setting), mdl, (x,), (x,), grad_variables="params", argnums=())


def _each(transform: Callable[..., Any], fn: Callable[..., Any]) -> Callable[..., Any]:
    """The Jacobian for each example, as of an energy or a field."""
    return lambda setting, mdl, x, v: jax.vmap(lambda x: transform(fn, mdl, x))(x)


def _by_hand(setting: Setting, params: Any) -> Callable[[jax.Array], jax.Array]:
    return lambda x: raw(setting, params, x)[0]


def _raw_loss(setting: Setting, params: Any, x: jax.Array) -> jax.Array:
    return setting.mean(raw(setting, params, x)[0] ** 2)


def _raw_grad(setting: Setting, params: Any, x: jax.Array, v: Any) -> Any:
    loss = functools.partial(_raw_loss, setting)
    return jax.value_and_grad(loss, (0, 1))(params, x)


def _raw_vjp(setting: Setting, params: Any, x: jax.Array, v: Any) -> Any:
    y, bwd = jax.vjp(lambda params, x: (raw(setting, params, x)[0], x * x), params, x)
    return y[0], bwd((y[0], jnp.zeros_like(y[1])))


def _raw_jvp(setting: Setting, params: Any, x: jax.Array, v: Any) -> Any:
    def fn(down: Any, x: jax.Array) -> Any:
        return raw(setting, {"up": params["up"], "down": down}, x)[0]

    return jax.jvp(fn, (params["down"], x), (v["down"], x))


def _raw_linearize(setting: Setting, params: Any, x: jax.Array, v: Any) -> Any:
    y, f_jvp = jax.linearize(lambda params, x: raw(setting, params, x)[0], params, x)
    held = jax.tree.map(jnp.zeros_like, v["down"])
    return y, f_jvp(v, x), f_jvp({"up": v["up"], "down": held}, jnp.zeros_like(x))


def _raw_hvp(setting: Setting, params: Any, x: jax.Array, v: Any) -> Any:
    gradient = jax.grad(functools.partial(_raw_loss, setting))
    return jax.jvp(lambda x: gradient(params, x), (x,), (x,))[1]


def _raw_each(transform: Callable[..., Any], fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda setting, params, x, v: jax.vmap(
        transform(lambda x: fn(_by_hand(setting, params), x))
    )(x)


def _energy(mdl: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(mdl(x) ** 2)


CASES = {
    "grad": Case(_grad, _raw_grad, "scalar down up batch"),
    "vjp": Case(_vjp, _raw_vjp, "batch down up batch"),
    "jvp": Case(_jvp, _raw_jvp, "batch batch"),
    "linearize": Case(_linearize, _raw_linearize, "batch batch batch"),
    "hvp": Case(_hvp, _raw_hvp, "down up"),
    "jacfwd": Case(_each(lifted.jacfwd, _call), _raw_each(jax.jacfwd, _call), "batch"),
    "jacrev": Case(_each(lifted.jacrev, _call), _raw_each(jax.jacrev, _call), "batch"),
    "hessian": Case(_each(lifted.hessian, _energy), _raw_each(jax.hessian, _energy), "batch"),
}


@functools.cache
def _on_one_device(transform: str) -> list[Any]:
    by_hand = functools.partial(CASES[transform].by_hand, Setting())
    return jax.tree.leaves(jax.jit(by_hand)(*unplaced()))


@pytest.mark.parametrize("transform", CASES)
@pytest.mark.parametrize("kind", KINDS)
@settings
def test_a_transform(setting: Setting, kind: str, transform: str) -> None:
    case = CASES[transform]

    def ours(params: Any, x: jax.Array, v: Any) -> Any:
        return case.ours(setting, KINDS[kind](setting, params), x, v)

    by_hand = functools.partial(case.by_hand, setting)
    found = assert_as_by_hand(setting, ours, by_hand, placed(setting), case.outs.split())
    assert_trees_close(found, _on_one_device(transform))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moves_are_seen(layout: str) -> None:
    setting = Setting(layout, "auto")
    args, outs = placed(setting), CASES["grad"].outs.split()
    by_hand = functools.partial(CASES["grad"].by_hand, setting)
    assert moves(setting.lowered(by_hand, args, outs).compile())

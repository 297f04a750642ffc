"""Eight devices: every transform gives the numbers of one device, leaves the results where raw JAX
leaves them, and moves no array that the raw program does not move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lifted
from nnx_bridge import Host
from tests.helpers import assert_trees_close, assert_trees_equal
from tests.sharding import (
    LAYOUTS,
    MLP,
    WIDTH,
    assert_same_compiled,
    moves,
    needs_8_devices,
    placed,
    unplaced,
)

pytestmark = needs_8_devices


class Native(nnx.Module):
    """The same in NNX."""

    def __init__(self, params: Any) -> None:
        def layer(name: str) -> nnx.Linear:
            made = nnx.eval_shape(
                lambda: nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=nnx.Rngs(0))
            )
            made.kernel.set_value(params[name]["kernel"])
            return made

        self.up, self.down = layer("up"), layer("down")

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.tanh(self.up(x)))


KINDS: dict[str, Callable[[Any], Any]] = {
    "Linen": lambda params: MLP().bind({"params": params}),
    "NNX": Native,
    "host": lambda params: Host(MLP(), {"params": params}),
}


def _call(mdl: Any, x: jax.Array) -> jax.Array:
    return mdl(x)


def _loss(mdl: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(mdl(x) ** 2)


def _hvp(mdl: Any, x: jax.Array, v: Any) -> Any:
    return lifted.hvp(_loss, mdl, (x,), (x,), grad_variables="params", argnums=())


def _linearize(mdl: Any, x: jax.Array, v: Any) -> Any:
    y, f_jvp = lifted.linearize(_call, mdl, x, grad_variables="params")
    return y, f_jvp({"params": v}, x)


def _vjp(mdl: Any, x: jax.Array, v: Any) -> Any:
    y, bwd = lifted.vjp(_call, mdl, x, vjp_variables="params")
    return bwd(y)


def _apply(params: Any, x: jax.Array) -> jax.Array:
    return MLP().apply({"params": params}, x)


def _raw_loss(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(_apply(params, x) ** 2)


def _raw_hvp(params: Any, x: jax.Array, v: Any) -> Any:
    return jax.jvp(lambda x: jax.grad(_raw_loss)(params, x), (x,), (x,))[1]


def _raw_linearize(params: Any, x: jax.Array, v: Any) -> Any:
    y, f_jvp = jax.linearize(_apply, params, x)
    return y, f_jvp(v, x)


def _raw_vjp(params: Any, x: jax.Array, v: Any) -> Any:
    y, bwd = jax.vjp(_apply, params, x)
    return bwd(y)


# Ours, and raw JAX on the parameters.
TRANSFORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "grad": (
        lambda mdl, x, v: lifted.grad(_loss, mdl, x, grad_variables="params"),
        lambda params, x, v: jax.grad(_raw_loss, (0, 1))(params, x),
    ),
    "vjp": (_vjp, _raw_vjp),
    "jvp": (
        lambda mdl, x, v: lifted.jvp(_call, mdl, (x,), (x,), {"params": v}),
        lambda params, x, v: jax.jvp(_apply, (params, x), (v, x)),
    ),
    "linearize": (_linearize, _raw_linearize),
    "hvp": (_hvp, _raw_hvp),
}


def _programs(kind: str, transform: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    ours, raw = TRANSFORMS[transform]

    def actual(params: Any, x: jax.Array, v: Any) -> list[Any]:
        return jax.tree.leaves(ours(KINDS[kind](params), x, v))

    return actual, lambda *args: jax.tree.leaves(raw(*args))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_for_shardings(layout: str, kind: str, transform: str) -> None:
    actual, expected = _programs(kind, transform)
    found = assert_same_compiled(actual, expected, *placed(layout))
    assert_trees_close(found, jax.jit(actual)(*unplaced()))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_with_shardings_in_types(kind: str, transform: str) -> None:
    args = placed("data", AxisType.Explicit)
    with jax.set_mesh(args[1].sharding.mesh):
        actual, expected = (jax.jit(fn) for fn in _programs(kind, transform))
        found, wanted = actual(*args), expected(*args)
        assert [jax.typeof(x) for x in found] == [jax.typeof(x) for x in wanted]
        assert_trees_equal(found, wanted)


@pytest.mark.parametrize("transform", ["grad", "jvp", "linearize"])
@pytest.mark.parametrize("kind", KINDS)
def test_under_shard_map(kind: str, transform: str) -> None:
    args = placed("data")
    mesh = args[1].sharding.mesh

    def mapped(fn: Callable[..., Any]) -> Callable[..., Any]:
        def summed(*args: Any) -> list[Any]:
            return [jax.lax.psum(jnp.sum(x), "data") for x in fn(*args)]

        return jax.jit(
            jax.shard_map(summed, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P())
        )

    actual, expected = map(mapped, _programs(kind, transform))
    assert_same_compiled(actual, expected, *args)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moves_are_seen(layout: str) -> None:
    _, raw = _programs("NNX", "grad")
    assert moves(jax.jit(raw).lower(*placed(layout)).compile())

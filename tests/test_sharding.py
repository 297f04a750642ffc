"""Eight devices: every transform gives the numbers of one device, leaves the results where raw JAX
leaves them, and moves no array that the raw program does not move."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lifted
from nnx_bridge import Host
from tests.helpers import assert_trees_close, assert_trees_equal, normal, randomized

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

WIDTH, BATCH = 32, 16
COLLECTIVES = r"\b(all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)(?:-start)?\("

# Where the kernels of the two layers and the batch are: axes "data" and "model" of a 4 x 2 mesh.
LAYOUTS = {
    "data": (P(), P(), P("data")),
    "tensor": (P(None, "model"), P("model", None), P("data")),
    "fsdp": (P("data"), P("data"), P("data")),
}


class MLP(nn.Module):
    """Two layers without biases."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(nn.Dense(WIDTH, use_bias=False, name="up")(x))
        return nn.Dense(WIDTH, use_bias=False, name="down")(x)


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


def _arguments() -> tuple[Any, jax.Array, Any]:
    x = normal(BATCH, WIDTH)
    params = randomized(MLP().init(jax.random.key(0), x))["params"]
    return params, x, randomized(params, 5)


def _placed(layout: str, kind: AxisType) -> tuple[Any, jax.Array, Any]:
    params, x, v = _arguments()
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    up, down, batch = (NamedSharding(mesh, spec) for spec in LAYOUTS[layout])
    shardings = {"up": {"kernel": up}, "down": {"kernel": down}}
    return (
        jax.device_put(params, shardings),
        jax.device_put(x, batch),
        jax.device_put(v, shardings),
    )


def _moves(text: str) -> Counter[str]:
    return Counter(re.findall(COLLECTIVES, text))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_for_shardings(layout: str, kind: str, transform: str) -> None:
    args = _placed(layout, AxisType.Auto)
    actual, expected = (jax.jit(fn).lower(*args).compile() for fn in _programs(kind, transform))
    assert _moves(actual.as_text()) == _moves(expected.as_text())
    found, wanted = actual(*args), expected(*args)
    assert [x.sharding for x in found] == [x.sharding for x in wanted]
    assert_trees_equal(found, wanted)
    on_one_device, _ = _programs(kind, transform)
    assert_trees_close(found, jax.jit(on_one_device)(*_arguments()))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_with_shardings_in_types(kind: str, transform: str) -> None:
    args = _placed("data", AxisType.Explicit)
    with jax.set_mesh(args[1].sharding.mesh):
        actual, expected = (jax.jit(fn) for fn in _programs(kind, transform))
        found, wanted = actual(*args), expected(*args)
        assert [jax.typeof(x) for x in found] == [jax.typeof(x) for x in wanted]
        assert_trees_equal(found, wanted)


@pytest.mark.parametrize("transform", ["grad", "jvp", "linearize"])
@pytest.mark.parametrize("kind", KINDS)
def test_under_shard_map(kind: str, transform: str) -> None:
    args = _placed("data", AxisType.Auto)
    mesh = args[1].sharding.mesh

    def mapped(fn: Callable[..., Any]) -> Callable[..., Any]:
        def summed(*args: Any) -> list[Any]:
            return [jax.lax.psum(jnp.sum(x), "data") for x in fn(*args)]

        return jax.jit(
            jax.shard_map(summed, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P())
        )

    actual, expected = map(mapped, _programs(kind, transform))
    assert _moves(actual.lower(*args).compile().as_text()) == _moves(
        expected.lower(*args).compile().as_text()
    )
    assert_trees_equal(actual(*args), expected(*args))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moves_are_seen(layout: str) -> None:
    _, raw = _programs("NNX", "grad")
    assert _moves(jax.jit(raw).lower(*_placed(layout, AxisType.Auto)).compile().as_text())

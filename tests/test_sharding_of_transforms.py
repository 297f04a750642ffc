"""Eight devices: Linen's transforms on NNX modules move nothing that raw JAX does not move, and
leave the results where it leaves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx_bridge
from tests.helpers import assert_trees_equal
from tests.sharding import LAYOUTS, WIDTH, assert_same_compiled, needs_8_devices, placed

pytestmark = needs_8_devices


class Block(nnx.Module):
    """Two products and what is around them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        return x + self.down(jnp.tanh(self.up(x))), None


LAYERS = 4
_STACKED = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


def _block(params: Any, x: jax.Array) -> jax.Array:
    return x + jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def _scanned(params: Any, x: jax.Array, step: Callable[..., Any] = _block) -> jax.Array:
    return jax.lax.scan(lambda x, layer: (step(layer, x), None), x, params)[0]


# Ours, and raw JAX on the stacked parameters.
TRANSFORMS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "scan": (nnx_bridge.scan(Block, length=LAYERS, **_STACKED), _scanned),
    "remat": (
        nnx_bridge.scan(nnx_bridge.remat(Block), length=LAYERS, **_STACKED),
        lambda params, x: _scanned(params, x, jax.checkpoint(_block)),
    ),
    "vmap": (
        nnx_bridge.vmap(Block, axis_size=LAYERS, in_axes=None, **_STACKED),
        jax.vmap(_block, in_axes=(0, None)),
    ),
}


def _programs(transform: str, x: jax.Array, layout: Any) -> tuple[Any, Any, Any, jax.Array]:
    """The gradients of ours and of raw JAX, and their arguments."""
    ours, raw = TRANSFORMS[transform]
    up, down, _ = (NamedSharding(x.sharding.mesh, P(None, *spec)) for spec in layout)
    model = ours(nnx.Rngs(0))
    for layer, place in ((model.up, up), (model.down, down)):
        layer.kernel.set_value(jax.device_put(layer.kernel[...], place))
    graphdef, state = nnx.split(model)

    def gradients(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.value_and_grad(lambda state, x: jnp.mean(fn(state, x) ** 2), (0, 1))

    return (
        gradients(lambda state, x: nnx.merge(graphdef, state)(x)[0]),
        gradients(lambda state, x: raw(nnx.to_pure_dict(state), x)),
        state,
        x,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_linen_on_nnx(layout: str, transform: str) -> None:
    assert_same_compiled(*_programs(transform, placed(layout)[1], LAYOUTS[layout]))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_with_shardings_in_types(transform: str) -> None:
    _, x, _ = placed("data", AxisType.Explicit)
    with jax.set_mesh(x.sharding.mesh):
        ours, raw, *args = _programs(transform, x, LAYOUTS["data"])
        found, wanted = (jax.tree.leaves(jax.jit(fn)(*args)) for fn in (ours, raw))
    assert [jax.typeof(x) for x in found] == [jax.typeof(x) for x in wanted]
    assert_trees_equal(found, wanted)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_under_shard_map(transform: str) -> None:
    _, x, _ = placed("data")
    ours, raw, *args = _programs(transform, x, LAYOUTS["data"])

    def mapped(fn: Callable[..., Any]) -> Callable[..., Any]:
        def summed(*args: Any) -> list[Any]:
            return [jax.lax.psum(jnp.sum(x), "data") for x in jax.tree.leaves(fn(*args))]

        specs = {"in_specs": (P(), P("data")), "out_specs": P()}
        return jax.shard_map(summed, mesh=x.sharding.mesh, **specs)

    assert_same_compiled(mapped(ours), mapped(raw), *args)

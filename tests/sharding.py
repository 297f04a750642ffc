"""Eight devices: layouts of two layers, and what a compiled program moves between devices."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers import assert_trees_equal, normal, randomized

needs_8_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

WIDTH, BATCH = 32, 16
_MOVES = r"\b(all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)(?:-start)?\("

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


def shardings(layout: str, kind: AxisType = AxisType.Auto) -> tuple[Any, NamedSharding]:
    """The shardings of the parameters of `MLP` and of a batch."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    up, down, batch = (NamedSharding(mesh, spec) for spec in LAYOUTS[layout])
    return {"up": {"kernel": up}, "down": {"kernel": down}}, batch


def unplaced() -> tuple[Any, jax.Array, Any]:
    """Parameters of `MLP`, a batch, and a tangent of the parameters, on one device."""
    x = normal(BATCH, WIDTH)
    params = randomized(MLP().init(jax.random.key(0), x))["params"]
    return params, x, randomized(params, 5)


def placed(layout: str, kind: AxisType = AxisType.Auto) -> tuple[Any, jax.Array, Any]:
    """The same in a layout."""
    params, x, v = unplaced()
    of_params, of_batch = shardings(layout, kind)
    return (
        jax.device_put(params, of_params),
        jax.device_put(x, of_batch),
        jax.device_put(v, of_params),
    )


def moves(compiled: Any) -> Counter[str]:
    """How often a compiled program moves something between devices, by the kind of the move."""
    return Counter(re.findall(_MOVES, compiled.as_text()))


def assert_same_compiled(
    actual: Callable[..., Any], expected: Callable[..., Any], *args: Any
) -> list[Any]:
    """Both move the same between devices, and give the same arrays in the same places."""
    ours, raw = (jax.jit(fn).lower(*args).compile() for fn in (actual, expected))
    assert moves(ours) == moves(raw)
    found, wanted = jax.tree.leaves(ours(*args)), jax.tree.leaves(raw(*args))
    assert [x.sharding for x in found] == [x.sharding for x in wanted]
    assert_trees_equal(found, wanted)
    return found

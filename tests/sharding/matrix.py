"""Eight devices: the matrix of layouts and modes, a small model for all of it, and what a compiled
program moves between devices.

A `Setting` is a layout in a mode. The model is the same in each; what differs is its product, which
says what JAX asks of any program there: where the result of an ambiguous product is, and which
kernel is gathered before it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nnx_bridge import Host
from tests.helpers import assert_trees_equal, normal, randomized

needs_8_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

WIDTH, BATCH = 16, 8
_MOVES = r"\b(all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)(?:-start)?\("

# Where the kernels of the two layers are: axes "data" and "model" of a 4 x 2 mesh. The batch is
# divided along "data" in all of them.
LAYOUTS = {
    "data": (P(None, None), P(None, None)),
    "tensor": (P(None, "model"), P("model", None)),
    "fsdp": (P(None, "data"), P(None, "data")),
}
# `jax.jit` with `NamedSharding`; shardings in types; each device with its part of the arrays.
MODES = ("auto", "explicit", "shard_map")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A layout in a mode; or one device, which has neither."""

    layout: str = "data"
    mode: str = "one device"

    def __str__(self) -> str:
        return f"{self.layout}-{self.mode}"

    @property
    def mesh(self) -> jax.sharding.Mesh:
        kind = AxisType.Explicit if self.mode == "explicit" else AxisType.Auto
        return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))

    def spec(self, what: str) -> P:
        """Where something is: a kernel, the ``batch``, what is ``hidden`` between the layers, or a
        ``scalar``. With ``s`` at the end: with an axis in front that nobody divides."""
        up, down = LAYOUTS[self.layout]
        batch = P("data", None)
        hidden = P("data", "model") if self.layout == "tensor" else batch
        known = {"up": up, "down": down, "batch": batch, "hidden": hidden, "scalar": P()}
        return known[what] if what in known else P(None, *known[what.removesuffix("s")])

    def place(self, what: str) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(what))

    @property
    def places(self) -> Any:
        """The shardings of the parameters."""
        return {name: {"kernel": self.place(name)} for name in ("up", "down")}

    def features(self, name: str) -> int:
        """The features of a layer, as its module sees them."""
        if self.mode != "shard_map":
            return WIDTH
        return WIDTH // {"data": 4, "model": 2}.get(self.spec(name)[-1], 1)

    def key(self) -> jax.Array:
        """A key to draw kernels with: inside of `jax.shard_map`, where a device sees its own part
        only, one for each part."""
        axis = {"tensor": "model", "fsdp": "data"}.get(self.layout)
        mapped = self.mode == "shard_map" and axis
        key = jax.random.key(0)
        return jax.random.fold_in(key, lax.axis_index(mapped)) if mapped else key

    def product(self, name: str) -> Product:
        return Product(self, name)

    def mean(self, x: jax.Array) -> jax.Array:
        """Over the whole batch."""
        mean = jnp.mean(x)
        return lax.pmean(mean, "data") if self.mode == "shard_map" else mean

    def lowered(self, fn: Callable[..., Any], args: Any, outs: Sequence[str]) -> Any:
        """The program of a function of arrays that are placed; the leaves of its result are to be
        where `spec` has ``outs``."""

        def program(*args: Any) -> list[Any]:
            return jax.tree.leaves(fn(*args))

        if self.mode == "shard_map":
            specs = {
                "in_specs": jax.tree.map(lambda x: x.sharding.spec, args),
                "out_specs": list(map(self.spec, outs)),
            }
            return jax.jit(jax.shard_map(program, mesh=self.mesh, **specs)).lower(*args)
        if self.mode == "auto":
            return jax.jit(program, out_shardings=list(map(self.place, outs))).lower(*args)
        with jax.set_mesh(self.mesh):
            return jax.jit(program).lower(*args)


SETTINGS = [Setting(layout, mode) for layout in LAYOUTS for mode in MODES]
settings = pytest.mark.parametrize("setting", SETTINGS, ids=str)
# For what cannot be inside of a `jax.shard_map`: what a call leaves in a model, what a file holds.
layouts = pytest.mark.parametrize(
    "setting", [s for s in SETTINGS if s.mode != "shard_map"], ids=str
)


@dataclasses.dataclass(frozen=True)
class Product:
    """`lax.dot_general` of a layer in a setting."""

    setting: Setting
    name: str

    def __call__(self, lhs: jax.Array, rhs: jax.Array, dims: Any, **options: Any) -> jax.Array:
        match self.setting.layout, self.setting.mode, self.name:
            case "tensor", "explicit", "down":
                options["out_sharding"] = P(*jax.typeof(lhs).sharding.spec[:-1], None)
            case "fsdp", "explicit", _:
                rhs = jax.sharding.reshard(rhs, P())
            case "tensor", "shard_map", "down":
                return lax.psum(lax.dot_general(lhs, rhs, dims, **options), "model")
            case "fsdp", "shard_map", _:
                rhs = lax.all_gather(rhs, "data", axis=rhs.ndim - 1, tiled=True)
        return lax.dot_general(lhs, rhs, dims, **options)


class MLP(nn.Module):
    """Two layers without biases; what is between them is sown and perturbed."""

    setting: Setting = Setting()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.perturb("hidden", jnp.tanh(self._layer("up")(x)))
        self.sow("intermediates", "hidden", h)
        return self._layer("down")(h)

    def _layer(self, name: str) -> nn.Dense:
        features, product = self.setting.features(name), self.setting.product(name)
        return nn.Dense(features, use_bias=False, dot_general=product, name=name)


class Native(nnx.Module):
    """The same in NNX."""

    def __init__(self, setting: Setting, params: Any) -> None:
        def layer(name: str) -> nnx.Linear:
            sizes, product = (WIDTH, setting.features(name)), setting.product(name)
            make = functools.partial(nnx.Linear, *sizes, use_bias=False, dot_general=product)
            made = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
            made.kernel.set_value(params[name]["kernel"])
            return made

        self.up, self.down = layer("up"), layer("down")

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jnp.tanh(self.up(x))
        if hasattr(self, "__captures__"):
            h = self.perturb("hidden", h)
            self.sow(nnx.Intermediate, "hidden", h)
        return self.down(h)


# The model with parameters in it.
KINDS: dict[str, Callable[[Setting, Any], Any]] = {
    "Linen": lambda setting, params: MLP(setting).bind({"params": params}),
    "NNX": Native,
    "host": lambda setting, params: Host(MLP(setting), {"params": params}),
}


def raw(setting: Setting, params: Any, x: jax.Array, seed: Any = None) -> tuple[Any, Any]:
    """The model in raw JAX: its output, and what is between its layers."""
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    h = jnp.tanh(setting.product("up")(x, params["up"]["kernel"], dims))
    h = h if seed is None else h + seed
    return setting.product("down")(h, params["down"]["kernel"], dims), h


def unplaced() -> tuple[Any, jax.Array, Any]:
    """Parameters of the model, a batch, and a tangent of the parameters, on one device."""
    x = normal(BATCH, WIDTH)
    params = randomized(MLP().init(jax.random.key(0), x)["params"])
    return params, x, randomized(params, 5)


def placed(setting: Setting) -> tuple[Any, jax.Array, Any]:
    """The same where a setting has them."""
    params, x, v = unplaced()
    places = setting.places
    return (
        jax.device_put(params, places),
        jax.device_put(x, setting.place("batch")),
        jax.device_put(v, places),
    )


def moves(compiled: Any) -> Counter[str]:
    """How often a compiled program moves something between devices, by the kind of the move."""
    return Counter(re.findall(_MOVES, compiled.as_text()))


# Programs that are the same are compiled and run once for the same arrays.
_RESULTS: dict[Any, tuple[Counter[str], list[Any]]] = {}


def _result(lowered: Any, args: Any) -> tuple[Counter[str], list[Any]]:
    """What the compiled program moves, and what it returns."""
    leaves = jax.tree.leaves(args)
    key = (lowered.as_text(), *((x.sharding, np.asarray(x).tobytes()) for x in leaves))
    if key not in _RESULTS:
        compiled = lowered.compile()
        _RESULTS[key] = moves(compiled), compiled(*args)
    return _RESULTS[key]


def assert_as_by_hand(
    setting: Setting,
    ours: Callable[..., Any],
    by_hand: Callable[..., Any],
    args: tuple[Any, ...],
    outs: Sequence[str],
) -> list[Any]:
    """Both programs move the same between devices, and give the same bits, which are where ``outs``
    says."""
    (moved, found), (allowed, wanted) = (
        _result(setting.lowered(fn, args, outs), args) for fn in (ours, by_hand)
    )
    assert moved == allowed
    assert_trees_equal(found, wanted)
    for x, what in zip(found, outs, strict=True):
        assert x.sharding.is_equivalent_to(setting.place(what), x.ndim), (what, x.sharding)
    return found

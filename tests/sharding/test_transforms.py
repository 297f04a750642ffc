"""Eight devices: Linen's transforms on NNX modules give the numbers of one device, leave the
results where they belong, and move no array that the program by hand does not move."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.linen import PARTITION_NAME

import lifted
import nnx_bridge as nn
from tests.helpers import assert_trees_close, normal
from tests.sharding.matrix import (
    BATCH,
    WIDTH,
    Native,
    Setting,
    assert_as_by_hand,
    needs_8_devices,
    raw,
    settings,
)

pytestmark = needs_8_devices

LAYERS = 3
Model = Callable[[Setting, Any, jax.Array], Any]  # From parameters and a batch to the output.


class Case(NamedTuple):
    """A function of a model that a transform lifts, and the same by hand; whether the parameters
    are stacked, and whether the function has gradients."""

    lifted: Callable[[Setting, Native, jax.Array], jax.Array]
    by_hand: Model
    stacked: bool = False
    has_gradients: bool = True


def _layer(setting: Setting, params: Any, x: jax.Array) -> jax.Array:
    return x + raw(setting, params, x)[0]


def _block(model: Native, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
    return x + model(x), None


def _call(model: Native, x: jax.Array) -> jax.Array:
    return x + model(x)


_STACKED: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


def _scanned(layer: Model) -> Model:
    def scan(setting: Setting, params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, params: (layer(setting, params, x), None), x, params)[0]

    return scan


def _rematted(setting: Setting, params: Any, x: jax.Array) -> jax.Array:
    return jax.checkpoint(functools.partial(_layer, setting))(params, x)


# The parameters of loops in loops have an axis for each of them.
def _deepened(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[:, None], tree)


def _remat_scan(setting: Setting, model: Native, x: jax.Array) -> jax.Array:
    nnx.update(model, _deepened(nnx.state(model)))
    return nn.remat_scan(_call, lengths=(LAYERS, 1))(model, x)


def _remat_scan_by_hand(setting: Setting, params: Any, x: jax.Array) -> jax.Array:
    def step(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
        return _scanned(_layer)(setting, params, x), None

    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), x, _deepened(params))[0]


def _mapped(setting: Setting, params: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(functools.partial(_layer, setting), (0, None), 1)(params, x)


# The scale that every step finds alike is written in a collection that is broadcast.
def _noting(model: Native, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
    model.seen[...] = model.first[...]
    return _block(model, x)


def _scan_that_writes(setting: Setting, model: Native, x: jax.Array) -> jax.Array:
    model.first, model.seen = nnx.BatchStat(x), nnx.BatchStat(jnp.zeros_like(x))
    axes = {"variable_axes": {"params": 0}, "variable_broadcast": "batch_stats"}
    y, _ = nn.scan(_noting, **axes)(model, x, None)
    return y + model.seen[...]


def _scan_by_hand(setting: Setting, params: Any, x: jax.Array) -> jax.Array:
    return _scanned(_layer)(setting, params, x) + x


def _switched(setting: Setting, params: Any, x: jax.Array) -> jax.Array:
    call = lambda scale: lambda params, x: scale * _layer(setting, params, x)  # noqa: E731
    return jax.lax.switch(_index(x), [call(1), call(2), call(3)], params, x)


def _branched(setting: Setting, params: Any, x: jax.Array) -> jax.Array:
    call = functools.partial(_layer, setting)
    return jax.lax.cond(_index(x) == 1, call, lambda params, x: 2 * call(params, x), params, x)


def _index(x: jax.Array) -> jax.Array:
    return jnp.int32(x.ndim) - 1  # One, which the compiler may not know.


def _counting(model: Native, x: jax.Array) -> jax.Array:
    model.count[...] += 1
    return _call(model, x)


def _while(setting: Setting, model: Native, x: jax.Array) -> jax.Array:
    model.count = nnx.BatchStat(jnp.int32(0))
    goes_on = lambda model, x: model.count[...] < LAYERS  # noqa: E731
    return nn.while_loop(goes_on, _counting, model, x, carry_variables="batch_stats")


def _while_by_hand(setting: Setting, params: Any, x: jax.Array) -> jax.Array:
    def step(carry: Any) -> Any:
        x, count = carry
        count = count + 1
        return _layer(setting, params, x), count

    return jax.lax.while_loop(lambda carry: carry[1] < LAYERS, step, (x, jnp.int32(0)))[0]


# The scale is drawn with a key of the model.
def _drawing(model: Native, x: jax.Array) -> jax.Array:
    return jax.random.uniform(model.rngs.scale()) * _call(model, x)


def _fold_rngs(setting: Setting, model: Native, x: jax.Array) -> jax.Array:
    model.rngs = nnx.Rngs(scale=0)
    return nn.fold_rngs(_drawing)(model, x)


def _drawn_by_hand(setting: Setting, params: Any, x: jax.Array) -> jax.Array:
    forked = jax.random.fold_in(jax.random.key(0), 0)
    key = jax.random.fold_in(forked, 0)
    return jax.random.uniform(key) * _layer(setting, params, x)


# The kernels have names, of which the first is that of an axis outside.
def _add_metadata_axis(setting: Setting, model: Native, x: jax.Array) -> jax.Array:
    for name in ("up", "down"):
        kernel = getattr(model, name).kernel
        kernel.set_metadata("out_sharding", ("layers", *setting.spec(name)))
    named = {"metadata_params": {PARTITION_NAME: "layers"}}
    return nn.add_metadata_axis(_call, variable_axes={"params": 0}, **named)(model, x)


def _scaled(scale: int) -> Callable[[Native, jax.Array], jax.Array]:
    return lambda model, x: scale * _call(model, x)


def _doubled(tree: Any) -> Any:
    return jax.tree.map(lambda x: 2 * x, tree)


def _forward(model: Native, x: jax.Array) -> Any:
    return lifted.vjp(_call, model, x)


def _backward(bwd: Any, t_y: jax.Array) -> Any:
    t_params, t_x = bwd(t_y)
    return _doubled(t_params), t_x


def _custom(setting: Setting, params: Any, x: jax.Array) -> jax.Array:
    @jax.custom_vjp
    def call(params: Any, x: jax.Array) -> jax.Array:
        return _layer(setting, params, x)

    def backward(bwd: Any, t_y: jax.Array) -> Any:
        t_params, t_x = bwd(t_y)
        return _doubled(t_params), t_x

    call.defvjp(lambda params, x: jax.vjp(functools.partial(_layer, setting), params, x), backward)
    return call(params, x)


CASES = {
    "scan": Case(
        lambda setting, model, x: nn.scan(_block, **_STACKED)(model, x, None)[0],
        _scanned(_layer),
        stacked=True,
    ),
    "scan that writes": Case(_scan_that_writes, _scan_by_hand, stacked=True),
    "scan of remat": Case(
        lambda setting, model, x: nn.scan(nn.remat(_block), **_STACKED)(model, x, None)[0],
        _scanned(_rematted),
        stacked=True,
    ),
    "remat_scan": Case(_remat_scan, _remat_scan_by_hand, stacked=True),
    "vmap": Case(
        lambda setting, model, x: nn.vmap(_call, in_axes=None, out_axes=1, **_STACKED)(model, x),
        _mapped,
        stacked=True,
    ),
    "remat": Case(lambda setting, model, x: nn.remat(_call)(model, x), _rematted),
    "jit": Case(
        lambda setting, model, x: nn.jit(_call)(model, x),
        lambda setting, params, x: jax.jit(functools.partial(_layer, setting))(params, x),
    ),
    "cond": Case(
        lambda setting, model, x: nn.cond(_index(x) == 1, _scaled(1), _scaled(2), model, x),
        _branched,
    ),
    "switch": Case(
        lambda setting, model, x: nn.switch(_index(x), [*map(_scaled, (1, 2, 3))], model, x),
        _switched,
    ),
    "while_loop": Case(_while, _while_by_hand, has_gradients=False),
    "map_variables": Case(
        lambda setting, model, x: nn.map_variables(_call, "params", _doubled)(model, x),
        lambda setting, params, x: _layer(setting, _doubled(params), x),
    ),
    "add_metadata_axis": Case(_add_metadata_axis, _layer),
    "fold_rngs": Case(_fold_rngs, _drawn_by_hand),
    "named_call": Case(lambda setting, model, x: nn.named_call(_call)(model, x), _layer),
    "custom_vjp": Case(
        lambda setting, model, x: nn.custom_vjp(_call, _forward, _backward)(model, x), _custom
    ),
}


def _arrays(stacked: bool) -> tuple[Any, jax.Array]:
    layers = (LAYERS,) if stacked else ()
    kernel = lambda seed: {"kernel": 0.3 * normal(*layers, WIDTH, WIDTH, seed=seed)}  # noqa: E731
    return {"down": kernel(1), "up": kernel(2)}, normal(BATCH, WIDTH)


def _places(setting: Setting, stacked: bool) -> tuple[list[str], Any]:
    """What the leaves of the parameters are, and their shardings."""
    names = {name: name + "s" * stacked for name in ("down", "up")}
    places = {name: {"kernel": setting.place(what)} for name, what in names.items()}
    return list(names.values()), places


def _program(case: Case, setting: Setting, model: Model) -> Callable[[Any, jax.Array], Any]:
    loss = lambda params, x: setting.mean(model(setting, params, x) ** 2)  # noqa: E731
    return jax.value_and_grad(loss, (0, 1)) if case.has_gradients else loss


@functools.cache
def _on_one_device(transform: str) -> list[Any]:
    case, setting = CASES[transform], Setting()
    return jax.tree.leaves(jax.jit(_program(case, setting, case.by_hand))(*_arrays(case.stacked)))


@pytest.mark.parametrize("transform", CASES)
@settings
def test_a_transform_of_linen_on_nnx(setting: Setting, transform: str) -> None:
    case = CASES[transform]
    params, x = _arrays(case.stacked)
    names, places = _places(setting, case.stacked)
    args = jax.device_put(params, places), jax.device_put(x, setting.place("batch"))

    def ours(setting: Setting, params: Any, x: jax.Array) -> jax.Array:
        return case.lifted(setting, Native(setting, params), x)

    programs = (_program(case, setting, model) for model in (ours, case.by_hand))
    outs = ["scalar", *names, "batch"] if case.has_gradients else ["scalar"]
    found = assert_as_by_hand(setting, *programs, args, outs)
    assert_trees_close(found, _on_one_device(transform))

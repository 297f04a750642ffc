"""Eight devices: weights are loaded to where they belong, and comparisons run sharded programs.

Checkpoints are in `tests/nnx_bridge/checkpoints/test_convert.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType

import nnx_bridge
from nnx_bridge import Host
from tests.helpers import assert_trees_equal
from tests.sharding import LAYOUTS, MLP, WIDTH, needs_8_devices, placed, shardings, unplaced

pytestmark = needs_8_devices
layouts = pytest.mark.parametrize("layout", LAYOUTS)


class Native(nnx.Module):
    """`MLP`, rewritten with other names."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear1 = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.linear2 = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear2(jnp.tanh(self.linear1(x)))


RULES = [("params/up", "linear1"), ("params/down", "linear2")]


def _native() -> Native:
    return Native(nnx.Rngs(0))


@layouts
def test_weights_are_loaded_to_where_the_source_has_them(layout: str) -> None:
    params, _, _ = placed(layout)
    for model in (_native(), nnx.eval_shape(_native)):
        nnx_bridge.load(model, {"params": params}, rules=RULES)
        assert model.linear1.kernel.get_value().sharding == params["up"]["kernel"].sharding
        assert model.linear2.kernel.get_value().sharding == params["down"]["kernel"].sharding


@layouts
@pytest.mark.parametrize("abstract", [False, True])
def test_weights_are_loaded_to_where_the_model_is(layout: str, abstract: bool) -> None:
    places, _ = shardings(layout)
    params, _, _ = unplaced()
    model = _native()
    for layer, name in ((model.linear1, "up"), (model.linear2, "down")):
        kernel, place = layer.kernel[...], places[name]["kernel"]
        held = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=place)
        layer.kernel.set_value(held if abstract else jax.device_put(kernel, place))
    nnx_bridge.load(model, {"params": params}, rules=RULES)
    assert model.linear1.kernel.get_value().sharding == places["up"]["kernel"]
    assert model.linear2.kernel.get_value().sharding == places["down"]["kernel"]
    assert_trees_equal(model.linear1.kernel.get_value(), params["up"]["kernel"])


class Renamed(nnx.Module):
    """`MLP`, rewritten with its names."""

    def __init__(self) -> None:
        self.up = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=nnx.Rngs(0))


def _training() -> tuple[Renamed, nnx.Optimizer[Any]]:
    model = Renamed()
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


@layouts
@pytest.mark.parametrize("abstract", [False, True])
def test_a_train_state_becomes_that_of_nnx_without_a_copy(layout: str, abstract: bool) -> None:
    params, _, _ = placed(layout)
    state = TrainState.create(apply_fn=MLP().apply, params=params, tx=optax.adam(1e-2))
    model, optimizer = nnx.eval_shape(_training) if abstract else _training()
    nnx_bridge.from_train_state(state, model, optimizer)
    back = nnx_bridge.to_train_state(model, optimizer, like=state)
    adam, adam_back = state.opt_state[0], back.opt_state[0]
    for ours, theirs in ((back.params, params), (adam_back.mu, adam.mu), (adam_back.nu, adam.nu)):
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, ours, theirs))


class Watched(nn.Module):
    """`MLP`, which tells where its kernels and inputs are, or are by their types."""

    note: Callable[[Any], None]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(nn.Dense(WIDTH, use_bias=False, name="up")(x))
        y = nn.Dense(WIDTH, use_bias=False, name="down")(x)
        kernels = (self.variables["params"][name]["kernel"] for name in ("up", "down"))
        self.note((*kernels, x))
        return y


def _compare(note: Callable[[Any], None], layout: str, kind: AxisType = AxisType.Auto) -> None:
    params, x, _ = placed(layout, kind)
    model = Host(MLP(), {"params": params})
    inputs = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    with jax.set_mesh(x.sharding.mesh):
        report = nnx_bridge.compare(
            Watched(note), model, inputs, variables={"params": params}, seeds=1, steps=2
        )
    assert report.agrees, report.failures
    assert _kernels(nnx.to_pure_dict(nnx.state(model))) == _kernels(params)


def _kernels(params: Any) -> list[Any]:
    return [params[name]["kernel"].sharding for name in ("up", "down")]


@layouts
def test_a_comparison_runs_programs_that_are_sharded(layout: str) -> None:
    seen: list[Any] = []

    def note(arrays: Any) -> None:
        jax.debug.inspect_array_sharding(arrays[0], callback=lambda up: seen.append(up))

    _compare(note, layout)
    places, _ = shardings(layout)
    assert seen
    assert all(place.is_equivalent_to(places["up"]["kernel"], 2) for place in seen)


def test_a_comparison_runs_programs_with_shardings_in_types() -> None:
    seen: list[Any] = []
    _compare(
        lambda arrays: seen.append(jax.typeof(arrays[-1]).sharding.spec), "data", AxisType.Explicit
    )
    assert {spec[0] for spec in seen} == {"data"}


def test_a_comparison_of_sharded_weights_sees_a_wrong_one() -> None:
    params, x, _ = placed("fsdp")
    model = Host(MLP(), {"params": params})
    model.up.kernel[...] = model.up.kernel[...].at[-1, -1].multiply(1.01)
    report = nnx_bridge.compare(
        MLP(), model, x, variables={"params": params}, check_values=True, seeds=1, steps=1
    )
    assert not report.agrees
    assert "up" in str(report.parting)

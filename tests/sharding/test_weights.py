"""Eight devices: weights go where they belong, by `load`, from train states and through
checkpoints, and comparisons run programs that are sharded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import nnx_bridge
from nnx_bridge.equivalence._exact import Exact
from tests.helpers import assert_trees_close, assert_trees_equal, normal, randomized
from tests.nnx_bridge.checkpoints.files import save
from tests.sharding.matrix import (
    KINDS,
    MLP,
    WIDTH,
    Native,
    Setting,
    layouts,
    needs_8_devices,
    placed,
    raw,
    settings,
    unplaced,
)

pytestmark = needs_8_devices


class Renamed(nnx.Module):
    """The model, rewritten with other names."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear1 = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.linear2 = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def kernels(self) -> dict[str, Any]:
        return {"up": self.linear1.kernel.get_value(), "down": self.linear2.kernel.get_value()}


RULES = [("params/up", "linear1"), ("params/down", "linear2")]


def _renamed() -> Renamed:
    return Renamed(nnx.Rngs(0))


def _kernels(params: Any) -> dict[str, Any]:
    return {name: layer["kernel"] for name, layer in params.items()}


def _assert_in_their_places(setting: Setting, kernels: dict[str, Any]) -> None:
    assert {name: x.sharding for name, x in kernels.items()} == _kernels(setting.places)
    assert_trees_equal(kernels, _kernels(unplaced()[0]))


@layouts
@pytest.mark.parametrize("make", [_renamed, lambda: nnx.eval_shape(_renamed)], ids=["", "abstract"])
def test_weights_are_loaded_to_where_the_source_has_them(
    setting: Setting, make: Callable[[], Renamed]
) -> None:
    model = make()
    with jax.set_mesh(setting.mesh):
        nnx_bridge.load(model, {"params": placed(setting)[0]}, rules=RULES)
    _assert_in_their_places(setting, model.kernels())


@layouts
@pytest.mark.parametrize("abstract", [False, True])
def test_weights_are_loaded_to_where_the_model_is(setting: Setting, abstract: bool) -> None:
    model = _renamed()
    for layer, name in ((model.linear1, "up"), (model.linear2, "down")):
        kernel, place = layer.kernel[...], setting.place(name)
        held = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=place)
        layer.kernel.set_value(held if abstract else jax.device_put(kernel, place))
    nnx_bridge.load(model, {"params": unplaced()[0]}, rules=RULES)
    _assert_in_their_places(setting, model.kernels())


@layouts
def test_gates_are_fused_and_put_where_the_model_is(setting: Setting) -> None:
    module = nn.OptimizedLSTMCell(WIDTH)
    x = normal(8, WIDTH)
    carry = module.initialize_carry(jax.random.key(0), x.shape)
    variables = randomized(module.init(jax.random.key(0), carry, x))
    model = nnx.OptimizedLSTMCell(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    nnx_bridge.load(model, variables)
    wanted = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def place(x: jax.Array) -> jax.Array:
        spec = setting.spec("up")
        return jax.device_put(x, NamedSharding(setting.mesh, P(*spec[2 - x.ndim :])))

    nnx.update(model, jax.tree.map(place, nnx.state(model, nnx.Param)))
    before = jax.tree.map(lambda x: x.sharding, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    with jax.set_mesh(setting.mesh):
        nnx_bridge.load(model, jax.tree.map(place, variables))
    found = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.map(lambda x: x.sharding, found) == before
    assert_trees_equal(found, wanted)


class Listed(nnx.Module):
    """Layers one by one, of which Linen has a stack."""

    def __init__(self) -> None:
        linear = lambda: nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=nnx.Rngs(0))  # noqa: E731
        self.layers = nnx.List([linear() for _ in range(3)])


@layouts
def test_layers_of_a_stack_are_loaded_one_by_one(setting: Setting) -> None:
    model, stack = Listed(), normal(3, WIDTH, WIDTH)
    for layer in model.layers:
        layer.kernel.set_value(jax.device_put(layer.kernel[...], setting.place("up")))
    variables = {"params": {"layers": {"kernel": jax.device_put(stack, setting.place("ups"))}}}
    with jax.set_mesh(setting.mesh):
        nnx_bridge.load(model, variables)
    for layer, kernel in zip(model.layers, stack, strict=True):
        assert layer.kernel[...].sharding == setting.place("up")
        assert_trees_equal(layer.kernel[...], kernel)


# Train states and checkpoints.


def _training() -> tuple[Native, nnx.Optimizer[Any]]:
    model = Native(Setting(), unplaced()[0])
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def _train_state(setting: Setting) -> TrainState:
    params, _, _ = placed(setting)
    with jax.set_mesh(setting.mesh):
        return TrainState.create(apply_fn=MLP().apply, params=params, tx=optax.adam(1e-2))


@layouts
@pytest.mark.parametrize("abstract", [False, True])
def test_a_train_state_becomes_that_of_nnx_without_a_copy(setting: Setting, abstract: bool) -> None:
    state = _train_state(setting)
    model, optimizer = nnx.eval_shape(_training) if abstract else _training()
    nnx_bridge.from_train_state(state, model, optimizer)
    back = nnx_bridge.to_train_state(model, optimizer, like=state)
    adam, adam_back = state.opt_state[0], back.opt_state[0]
    for ours, theirs in (
        (back.params, state.params),
        (adam_back.mu, adam.mu),
        (adam_back.nu, adam.nu),
    ):
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, ours, theirs))


@layouts
def test_a_checkpoint_keeps_its_shards_and_fills_a_sharded_model(
    setting: Setting, tmp_path: Path
) -> None:
    save(tmp_path / "linen", _train_state(setting))
    nnx_bridge.convert(tmp_path / "linen", tmp_path / "nnx")
    linen, native = (
        ocp.PyTreeCheckpointer().metadata(tmp_path / name).item_metadata
        for name in ("linen", "nnx")
    )
    for name in ("up", "down"):
        before, after = linen["params"][name]["kernel"], native["model"][name]["kernel"]["value"]
        assert after.storage.chunk_shape == before.storage.chunk_shape != (WIDTH, WIDTH)
        assert after.sharding.to_jax_sharding().is_equivalent_to(setting.place(name), 2)
    for folder in ("linen", "nnx"):
        with jax.set_mesh(setting.mesh):
            model = Native(setting, jax.tree.map(jnp.zeros_like, placed(setting)[0]))
            optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
            nnx_bridge.load_checkpoint(tmp_path / folder, model, optimizer)
        params = nnx.to_pure_dict(nnx.state(model))
        _assert_in_their_places(setting, _kernels(params))
        moments = _kernels(nnx.to_pure_dict(nnx.state(optimizer.opt_state[0].mu)))
        assert {n: x.sharding for n, x in moments.items()} == _kernels(setting.places)


# Comparisons.


def _twice(setting: Setting, kernels: Any, x: jax.Array) -> jax.Array:
    """The model in a loop."""
    params = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    return jax.lax.scan(lambda x, _: (raw(setting, params, x)[0], None), x, length=2)[0]


def _mapped(setting: Setting, kernels: Any, x: jax.Array) -> jax.Array:
    """The same inside of a `jax.shard_map`, where the setting says so."""
    if setting.mode != "shard_map":
        return _twice(setting, kernels, x)
    specs = {name: setting.spec(name) for name in kernels}, setting.spec("batch")
    mapped = jax.shard_map(
        lambda kernels, x: _twice(setting, kernels, x),
        mesh=setting.mesh,
        in_specs=specs,
        out_specs=specs[1],
    )
    return mapped(kernels, x)


class Watched(nn.Module):
    """Tells where its kernels and inputs are, or are by their types."""

    setting: Setting
    note: Callable[[Any, Any], None]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.ones
        kernels = {name: self.param(name, init, (WIDTH, WIDTH)) for name in ("up", "down")}
        self.note(kernels["up"], x)
        return _mapped(self.setting, kernels, x)


class Rewritten(nnx.Module):
    """The same in NNX."""

    def __init__(self, setting: Setting, kernels: Any) -> None:
        self.setting = setting
        self.up, self.down = nnx.Param(kernels["up"]), nnx.Param(kernels["down"])

    def __call__(self, x: jax.Array) -> jax.Array:
        return _mapped(self.setting, {"up": self.up[...], "down": self.down[...]}, x)


@settings
def test_a_comparison_runs_programs_that_are_sharded(setting: Setting) -> None:
    params, x, _ = placed(setting)
    kernels, seen = _kernels(params), []

    def note(kernel: jax.Array, x: jax.Array) -> None:
        if setting.mode == "explicit":
            types = (jax.typeof(array) for array in (kernel, x))
            seen.append([NamedSharding(setting.mesh, of.sharding.spec) for of in types])
        else:
            jax.debug.inspect_array_sharding(kernel, callback=lambda place: seen.append([place]))

    inputs = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    model = Rewritten(setting, kernels)
    with jax.set_mesh(setting.mesh):
        report = nnx_bridge.compare(
            Watched(setting, note), model, inputs, variables={"params": kernels}, seeds=1, steps=2
        )
    assert report.agrees, report.failures
    _assert_in_their_places(setting, {"up": model.up[...], "down": model.down[...]})
    assert seen
    for places in seen:
        for place, what in zip(places, ("up", "batch"), strict=False):
            assert place.is_equivalent_to(setting.place(what), 2)


def test_loops_of_the_reference_in_float64_keep_their_shardings() -> None:
    setting = Setting("data", "explicit")
    _, x, _ = placed(setting)

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        # A choice is between arrays of one sharding.
        return jnp.where(x > 0, jnp.sin(x), jnp.zeros_like(x)), None

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.scan(step, x, length=2)[0]

    with jax.set_mesh(setting.mesh):
        assert_trees_close(Exact(loop, x)(x), loop(x))


def test_the_reference_in_float64_has_the_axes_of_a_shard_map() -> None:
    setting = Setting("data", "shard_map")
    _, x, _ = placed(setting)

    def total(part: jax.Array) -> jax.Array:
        return jax.lax.psum(jnp.sin(part).sum(), "data")

    mapped = jax.shard_map(total, mesh=setting.mesh, in_specs=setting.spec("batch"), out_specs=P())
    assert_trees_close(Exact(mapped, x)(x), jnp.sin(x).sum())


def test_a_comparison_of_sharded_weights_sees_a_wrong_one() -> None:
    setting = Setting("fsdp", "auto")
    params, x, _ = placed(setting)
    model = KINDS["host"](setting, params)
    model.up.kernel[...] = model.up.kernel[...].at[-1, -1].multiply(1.01)
    report = nnx_bridge.compare(
        MLP(), model, x, variables={"params": params}, check_values=True, seeds=1, steps=1
    )
    assert not report.agrees
    assert "up" in str(report.parting)

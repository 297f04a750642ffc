"""Models and optimizers filled from train states: all or nothing, and what is wrong by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

from nnx_bridge import CheckpointError, convert, from_train_state, load_checkpoint, to_train_state
from tests.helpers import assert_trees_equal, normal
from tests.nnx_bridge.checkpoints.files import assert_same_checkpoint, save
from tests.nnx_bridge.checkpoints.models import batch, initial, linen_step, native, nnx_optimizer


@pytest.fixture(scope="module")
def state() -> Any:
    """A Linen train state after a step."""
    return linen_step(initial(), *batch(0))[0]


def _changed(state: Any, change: Callable[[Any], None]) -> Any:
    params = jax.tree.map(lambda x: x, state.params)
    change(params)
    return state.replace(params=params)


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "missing": (lambda p: p["Dense_0"].pop("bias"), "lacks model/Dense_0/bias"),
    "extra": (
        lambda p: p["Dense_0"].update(scale=normal(4)),
        "no place for model/Dense_0/scale",
    ),
    "renamed": (
        lambda p: p.update(Dense_9=p.pop("Dense_0")),
        "is model/Dense_9/bias what the model calls model/Dense_0/bias",
    ),
    "shape": (
        lambda p: p["Dense_0"].update(kernel=normal(4, 48)),
        r"model/Dense_0/kernel is float32\[4, 48\] there and float32\[48, 4\] in the model",
    ),
    "dtype": (
        lambda p: p["Dense_0"].update(bias=normal(4, dtype=jnp.bfloat16)),
        r"model/Dense_0/bias is bfloat16\[4\] there and float32\[4\] in the model",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_and_the_model_stays_as_it_was(state: Any, name: str) -> None:
    change, message = WRONG[name]
    model = native()
    before = jax.tree.map(jnp.copy, nnx.state(model))
    wrong = _changed(state, change)
    variables = {"params": wrong.params, "batch_stats": wrong.batch_stats}
    with pytest.raises(CheckpointError, match=message):
        from_train_state(variables, model)
    assert_trees_equal(nnx.state(model), before)


def test_a_checkpoint_without_an_optimizers_state_does_not_fill_an_optimizer(state: Any) -> None:
    model = native()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    with pytest.raises(CheckpointError, match="lacks optimizer/opt_state/1/0/count"):
        from_train_state(variables, model, nnx_optimizer(model))


def test_the_state_of_another_optimizer_is_named(state: Any) -> None:
    model = native()
    with pytest.raises(CheckpointError, match="no place for optimizer/opt_state/1/0/count"):
        from_train_state(state, model, nnx_optimizer(model, optax.sgd(0.1)))


def test_another_mask_is_named() -> None:
    params = {"kernel": normal(2, 3), "bias": normal(3)}

    def masked(which: int) -> Any:
        return optax.masked(
            optax.trace(0.9), lambda p: jax.tree.map(lambda x: jnp.ndim(x) == which, p)
        )

    state = {"params": params, "opt_state": masked(1).init(params), "step": 0}
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match="inner_state/trace/bias is masked in the opt"):
        from_train_state(state, model, nnx.Optimizer(model, masked(2), wrt=nnx.Param))


def test_a_model_alone_is_filled_from_a_whole_train_state(state: Any) -> None:
    model = native()
    beside = from_train_state(state, model)
    assert_trees_equal(model.BatchNorm_0.mean[...], state.batch_stats["BatchNorm_0"]["mean"])
    assert set(beside) == {"ema_params", "dropout_key"}


def test_the_layers_own_streams_are_left_alone(state: Any) -> None:
    model = native()
    before = jax.random.key_data(model.Dropout_0.rngs.key[...])
    from_train_state(state, model)
    assert_trees_equal(jax.random.key_data(model.Dropout_0.rngs.key[...]), before)


def test_metadata_boxes_are_opened_and_closed_again() -> None:
    def boxed(seed: int) -> Any:
        return nn.Partitioned(normal(2, 3, seed=seed), ("a", None))

    tx = optax.adam(0.1)
    params = {"kernel": boxed(1), "bias": normal(3)}
    state = {"params": params, "opt_state": tx.init(params), "step": 2}
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    from_train_state(state, model, optimizer)
    assert_trees_equal(model.kernel[...], params["kernel"].value)
    assert_trees_equal(to_train_state(model, optimizer, state), state)


def test_checkpoints_of_both_sides_fill_the_same_model(state: Any, tmp_path: Path) -> None:
    model, other = native(), native()
    optimizer, other_optimizer = nnx_optimizer(model), nnx_optimizer(other)
    save(tmp_path / "linen", state)
    load_checkpoint(tmp_path / "linen", model, optimizer)
    save(tmp_path / "nnx", nnx.state((model, optimizer)))
    load_checkpoint(tmp_path / "nnx", other, other_optimizer)
    wanted = nnx.state((model, optimizer), nnx.Not(nnx.RngState))
    assert_trees_equal(nnx.state((other, other_optimizer), nnx.Not(nnx.RngState)), wanted)


def test_a_train_state_of_nnx_is_no_structure_of_linen() -> None:
    model = native()
    like = {"model": nnx.to_pure_dict(nnx.state(model)), "optimizer": {"step": jnp.uint32(0)}}
    with pytest.raises(CheckpointError, match="'nnx_train_state', which is not one of Linen"):
        to_train_state(model, None, like)


class _Lists(nnx.Module):
    """Variables that hold lists."""

    def __init__(self) -> None:
        self.layers = nnx.Param([{"w": jnp.zeros(2)}, {"w": jnp.zeros(3)}])
        self.v = nnx.Param(jnp.zeros(2))


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.sm3(0.1)], ids=["adam", "sm3"])
def test_lists_are_filled_leaf_by_leaf(tx: Any, tmp_path: Path) -> None:
    params = {"layers": [{"w": normal(2)}, {"w": normal(3)}], "v": normal(2)}
    state = tx.update(params, tx.init(params), params)[1]
    linen = save(tmp_path / "linen", {"params": params, "opt_state": state, "step": 4})
    convert(linen, tmp_path / "nnx")
    for source in (linen, tmp_path / "nnx"):
        model = _Lists()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        load_checkpoint(source, model, optimizer)
        assert_trees_equal(model.layers.get_value(), params["layers"])
        moment = optimizer.opt_state[0].nu["layers"].get_value()
        assert_trees_equal(jax.tree.leaves(moment), jax.tree.leaves(state[0].nu["layers"]))
    convert(tmp_path / "nnx", tmp_path / "back")
    assert_same_checkpoint(tmp_path / "back", linen)


def test_keys_of_an_optimizer_are_a_part_of_its_state(tmp_path: Path) -> None:
    params = {"kernel": normal(2, 3), "bias": normal(3)}
    state = optax.add_noise(0.1, 0.5, jax.random.key(5)).init(params)
    raw = state._replace(rng_key=jax.random.key_data(state.rng_key))
    for name, opt_state in (("typed", state), ("raw", raw)):
        save(tmp_path / name, {"params": params, "opt_state": opt_state, "step": 4})
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        other = optax.add_noise(0.1, 0.5, jax.random.key(1))
        optimizer = nnx.Optimizer(model, other, wrt=nnx.Param)
        load_checkpoint(tmp_path / name, model, optimizer)
        assert_trees_equal(optimizer.opt_state.rng_key[...], jax.random.key(5))

"""A Linen run that is stopped and goes on in NNX takes the steps that it would have taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from nnx_bridge import convert, from_train_state, load_checkpoint, to_train_state
from tests.helpers import assert_trees_equal
from tests.nnx_bridge.checkpoints.models import (
    State,
    batch,
    host,
    initial,
    linen_step,
    native,
    nnx_optimizer,
    nnx_step,
)

STOP, END = 3, 8


@pytest.fixture(scope="module")
def run() -> tuple[State, list[State], list[jax.Array]]:
    """A Linen run: the state in which it is stopped, and the states and losses after that."""
    state, states, losses = initial(), [], []
    for step in range(END):
        if step == STOP:
            stopped = state
        state, loss = linen_step(state, *batch(step))
        if step >= STOP:
            states.append(state)
            losses.append(loss)
    return stopped, states, losses


def _through_a_checkpoint(state: State, folder: Path, model: Any, optimizer: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "linen", state)
    convert(folder / "linen", folder / "nnx")
    return load_checkpoint(folder / "nnx", model, optimizer)


def _in_memory(state: State, folder: Path, model: Any, optimizer: Any) -> Any:
    return from_train_state(state, model, optimizer)


@pytest.mark.parametrize("make", [native, host])
@pytest.mark.parametrize("move", [_through_a_checkpoint, _in_memory])
def test_every_step_after_the_move_equals_linens_to_the_bit(
    run: Any, make: Callable[[], Any], move: Callable[..., Any], tmp_path: Path
) -> None:
    stopped, states, losses = run
    model = make()
    optimizer = nnx_optimizer(model)
    beside = move(stopped, tmp_path, model, optimizer)
    average = beside["ema_params"]
    for i, (state, loss) in enumerate(zip(states, losses, strict=True)):
        average, value = nnx_step(
            model, optimizer, average, beside["dropout_key"], *batch(STOP + i)
        )
        assert_trees_equal(value, loss)
        got = to_train_state(
            model, optimizer, state, ema_params=average, dropout_key=beside["dropout_key"]
        )
        assert_trees_equal(got, state)


def test_with_the_layers_own_streams_the_steps_differ(run: Any) -> None:
    stopped, _, losses = run
    model = native()
    optimizer = nnx_optimizer(model)
    from_train_state(stopped, model, optimizer)
    x, y = batch(STOP)

    @nnx.jit
    def loss(model: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x, train=True), y).mean()

    assert loss(model) != losses[0]

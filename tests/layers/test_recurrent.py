"""Recurrent layers: one mask on the hidden-to-hidden weights for each sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import WeightDrop, drop_weights, hidden_to_hidden

RATE = 0.5


def rngs():
    return nnx.Rngs(0)


CELLS = [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell]


@pytest.mark.parametrize("cell", CELLS)
def test_hidden_to_hidden_selects_the_recurrent_kernels_alone(cell, key):
    rnn = nnx.RNN(cell(3, 5, rngs=rngs()))
    dropped = drop_weights(rnn, key, RATE, params=hidden_to_hidden)
    pairs = zip(*(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (rnn, dropped)), strict=True)
    for (path, before), (_, after) in pairs:
        recurrent = before.ndim == 2 and before.shape[0] == 5
        assert (after is not before) == recurrent, path


@pytest.mark.parametrize("cell", CELLS)
def test_one_mask_serves_a_whole_sequence(cell, key):
    base, x = cell(3, 5, rngs=rngs()), jax.random.normal(key, (2, 4, 3))
    layer = WeightDrop(nnx.RNN(base), RATE, params=hidden_to_hidden, rngs=nnx.Rngs(1))
    sequence_key = jax.random.fold_in(layer.rngs.key[...], 0)
    masked = layer.draw(rngs=sequence_key).cell
    carry, outputs = masked.initialize_carry((2, 3), rngs()), []
    for step in range(4):
        carry, y = masked(carry, x[:, step])
        outputs.append(y)
    # The loop is compiled step by step, the scan as one.
    np.testing.assert_allclose(layer(x), jnp.stack(outputs, 1), rtol=1e-5, atol=1e-6)
    assert int(layer.rngs.count[...]) == 1


def test_around_the_cell_each_step_has_a_mask_of_its_own():
    cell = WeightDrop(nnx.SimpleCell(3, 5, rngs=rngs()), RATE, rngs=nnx.Rngs(1))
    rnn = nnx.RNN(cell)
    before = int(cell.rngs.count[...])
    rnn(jnp.ones((2, 4, 3)))
    # One for the initial carry, one for each step.
    assert int(cell.rngs.count[...]) - before == 5


def test_draw_holds_one_mask_over_several_calls():
    layer = WeightDrop(nnx.Linear(4, 4, rngs=rngs()), RATE, rngs=nnx.Rngs(1))
    masked, x = layer.draw(), jnp.ones((1, 4))
    np.testing.assert_array_equal(masked(x), masked(x))
    assert layer.draw(deterministic=True) is layer.base_layer

"""The undocumented parts of Flax NNX that `nnx_bridge` uses do what it relies on."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nnx_bridge import _flax_private


def test_the_state_is_that_of_the_transform_in_progress() -> None:
    seen = [_flax_private.trace_state()]

    def fn(x: jax.Array) -> jax.Array:
        seen.append(_flax_private.trace_state())
        return 2 * x

    for transform in (jax.jit, jax.grad, jax.vmap):
        transform(fn)(jnp.ones(3) if transform is jax.vmap else 1.0)
    outside, *inside = seen
    assert outside == _flax_private.trace_state()
    assert all(state != outside for state in inside)

"""The undocumented part of JAX that `lifted` uses does what it relies on."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lifted._jax_private import traces


def test_a_tracer_belongs_to_the_transform_that_made_it() -> None:
    seen = []

    def inner(x: jax.Array, y: jax.Array) -> jax.Array:
        seen.extend([traces(x), traces((x, y)), traces(x * y)])
        return x * y

    def outer(y: jax.Array) -> jax.Array:
        seen.append(traces(y))
        return jax.grad(lambda x: inner(x, y))(2.0)

    jax.grad(outer)(3.0)
    of_y, of_x, of_both, of_product = seen
    assert len(of_x) == len(of_y) == 1
    assert of_both == of_x | of_y
    assert of_product == of_x != of_y


def test_an_array_belongs_to_none() -> None:
    assert traces({"a": jnp.ones(2), "b": 1.0}) == set()

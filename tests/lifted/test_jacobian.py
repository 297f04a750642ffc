"""Jacobians and Hessians: the shape of every entry, and the derivative that stands in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import lifted
from tests.helpers import assert_trees_close, initialized, normal
from tests.lifted import models

X, COUNTS, Z = normal(3), jnp.arange(2), normal(4, seed=5)
INPUTS = (X, COUNTS, Z)
MODULE = models.MLP()
BOUND = MODULE.bind(initialized(MODULE, X))


def _grid(mdl: nn.Module, x: jax.Array, counts: jax.Array, z: jax.Array) -> jax.Array:
    """An output of shape (2, 5), of which no two sizes are those of an input."""
    return jnp.outer(
        mdl(x), jnp.stack([z.sum() ** 2, z[0], x[1] * z[1], z[2], counts.sum() * x[0]])
    )


def _entries(derivative: Any) -> list[tuple[Any, tuple[int, ...]]]:
    return [(entry.dtype, entry.shape) for entry in derivative]


def _kind(*inputs: jax.Array) -> Any:
    return jax.dtypes.float0 if any(i is COUNTS for i in inputs) else jnp.float32


@pytest.mark.parametrize("transform", [lifted.jacfwd, lifted.jacrev])
def test_an_entry_has_the_shape_of_the_output_and_then_of_the_input(
    transform: Callable[..., Any],
) -> None:
    jacobian = transform(_grid, BOUND, *INPUTS)
    assert _entries(jacobian) == [(_kind(i), (2, 5, *i.shape)) for i in INPUTS]
    pure = lambda x, z: _grid(BOUND, x, COUNTS, z)  # noqa: E731
    assert_trees_close((jacobian[0], jacobian[2]), jax.jacobian(pure, argnums=(0, 1))(X, Z))


def test_an_entry_of_a_hessian_has_the_shapes_of_both_inputs() -> None:
    hessian = lifted.hessian(_grid, BOUND, *INPUTS)
    for row, first in zip(hessian, INPUTS, strict=True):
        expected = [(_kind(first, i), (2, 5, *first.shape, *i.shape)) for i in INPUTS]
        assert _entries(row) == expected
    rows = [[hessian[i][j] for j in (0, 2)] for i in (0, 2)]
    pure = lambda x, z: _grid(BOUND, x, COUNTS, z)  # noqa: E731
    expected = jax.hessian(pure, argnums=(0, 1))(X, Z)
    assert_trees_close(rows, [list(row) for row in expected])


@pytest.mark.parametrize("transform", [lifted.jacrev, lifted.hessian])
def test_an_integer_output_has_no_reverse_mode(transform: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="fn must return real arrays, got int32"):
        transform(lambda mdl, x: jnp.round(mdl(x)).astype(int), BOUND, X)

"""Builders and assertions that the tests share."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """The same structure, and at every leaf the same shape, dtype and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        where = jax.tree_util.keystr(path)
        if jax.dtypes.issubdtype(jax.numpy.asarray(got).dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        got, want = np.asarray(got), np.asarray(want)
        assert got.dtype == want.dtype, where
        np.testing.assert_array_equal(got, want, err_msg=where)

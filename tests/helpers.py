"""Builders and assertions that the tests share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

KEY = jax.random.key(0)

# How far two programs may differ that compute the same by other means: the rounding of a few dozen
# operations on numbers of size one. Programs that are the same are compared without tolerance.
_OPERATIONS = 64


def tolerance(*arrays: Any) -> float:
    """Relative and absolute error allowed for the coarsest floating dtype among ``arrays``."""
    dtypes = [jnp.asarray(x).dtype for x in arrays]
    return _OPERATIONS * max(
        [float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.inexact)], default=0.0
    )


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """The same structure, and at every leaf the same shape, dtype and bits."""
    for where, got, want in _leaves(actual, expected):
        assert got.dtype == want.dtype, where
        np.testing.assert_array_equal(got, want, err_msg=where)


def assert_trees_close(actual: Any, expected: Any, *, factor: float = 1.0) -> None:
    """The same structure, and at every leaf values within ``factor`` times `tolerance`."""
    for where, got, want in _leaves(actual, expected):
        limit = factor * tolerance(got, want)
        got, want = (x.astype(np.result_type(x.dtype, np.float32)) for x in (got, want))
        np.testing.assert_allclose(got, want, rtol=limit, atol=limit, err_msg=where)


def _leaves(actual: Any, expected: Any) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        if jax.dtypes.issubdtype(getattr(got, "dtype", np.int32), jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        yield jax.tree_util.keystr(path), np.asarray(got), np.asarray(want)


def program(fn: Callable[..., Any], *args: Any) -> str:
    """The jaxpr of ``fn`` as text, without the addresses of functions in it."""
    return re.sub(r"0x[0-9a-f]+", "0x", str(jax.make_jaxpr(fn)(*args)))


def assert_same_program(actual: Callable[..., Any], expected: Callable[..., Any], *args: Any):
    """Both functions have the same jaxpr: the same equations in the same order."""
    assert program(actual, *args) == program(expected, *args)


@contextmanager
def strict() -> Iterator[None]:
    """JAX with its checks for leaked tracers and malformed programs."""
    with jax.checking_leaks(), jax.enable_checks(True):
        yield


def normal(*shape: int, seed: int = 1, dtype: Any = jnp.float32) -> jax.Array:
    """Numbers drawn from a normal distribution."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def normal_like(tree: Any, seed: int = 2) -> Any:
    """A tangent for each leaf of ``tree``, None where a leaf cannot have one."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), max(len(leaves), 1))[: len(leaves)]
    drawn = [
        jax.random.normal(k, np.shape(x), jnp.asarray(x).dtype)
        if jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact)
        else None
        for k, x in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(drawn)


def call(mdl: Any, *args: Any) -> Any:
    """The plainest function of a module."""
    return mdl(*args)


def total(mdl: Any, *args: Any) -> jax.Array:
    """A scalar function of a module whose derivatives of all orders depend on its output."""
    return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(mdl(*args)))


def randomized(variables: Any, seed: int = 3) -> Any:
    """``variables`` with noise on floating leaves, so that zero biases do not hide a mistake."""
    return jax.tree.map(
        lambda x, n: x if n is None else x + 0.1 * n, variables, normal_like(variables, seed)
    )


def initialized(module: nn.Module, *args: Any, method: Any = None) -> Any:
    """Variables of a Linen module, none of them zero."""
    rngs = {"params": KEY, "dropout": jax.random.key(7)}
    return randomized(module.init(rngs, *args, method=method))


class Inside(nn.Module):
    """Calls ``use(inner, *args)``: where a user would write a transform inside a module."""

    inner: nn.Module
    use: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.use(self.inner, *args)

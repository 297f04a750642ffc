"""On whatever device there is: the same numbers as raw JAX, in the precision that was asked for.

Two comparisons. With raw JAX on the same device, compiled: the programs are the same, so the bits
are. With raw JAX in float64 on the CPU: what is left is the rounding of the device, and `_limit`
says how much of it there may be. The limit of a precision lies below the error of the next coarser
one, so that a matrix product that loses its precision on the way is seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import lifted
from tests.helpers import assert_trees_equal, normal, randomized

ON_CPU = jax.default_backend() == "cpu"

# The largest relative error of rounding one number. CPUs compute float32 whatever is asked for.
UNIT = {"highest": 2.0**-24, "tensorfloat32": 2.0**-11, "bfloat16": 2.0**-9}
PRECISIONS = ["highest", "bfloat16"] if ON_CPU else list(UNIT)
_DEPTH = 3


def _limit(precision: str) -> float:
    """How far, relative to the norm of the result, a derivative may be from that in float64.

    Roundings are independent. A sum of k rounded products is off by about sqrt(k) of their size
    times the unit, and is itself of about sqrt(k) of their size; so a matrix product adds about one
    unit for each of its two rounded operands, whatever its width. A derivative passes through the
    network forward and back, tanh and its slope add a few units of float32; errors of independent
    stages add in squares. With a margin of two:
    """
    stages = 2 * _DEPTH
    return 2 * (2 * stages) ** 0.5 * UNIT[precision] + 4 * stages * UNIT["highest"]


class Linen(nn.Module):
    """A network that computes in the type that it is given."""

    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(_DEPTH - 1):
            x = jnp.tanh(nn.Dense(self.width, dtype=self.dtype)(x))
        return nn.Dense(1, dtype=self.dtype)(x)


class Native(nnx.Module):
    """The same network in NNX, with the variables of the first."""

    def __init__(self, params: Any, dtype: Any = None) -> None:
        self.layers = nnx.List()
        for i in range(_DEPTH):
            kernel, bias = params[f"Dense_{i}"]["kernel"], params[f"Dense_{i}"]["bias"]
            layer = nnx.Linear(*kernel.shape, dtype=dtype, rngs=nnx.Rngs(0))
            layer.kernel.set_value(kernel)
            layer.bias.set_value(bias)
            self.layers.append(layer)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = jnp.tanh(layer(x))
        return self.layers[-1](x)


def _total(mdl: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(mdl(x).astype(jnp.float32))


def _derivatives(mdl: Any, x: jax.Array, v: jax.Array) -> tuple[Any, jax.Array]:
    grads = lifted.grad(_total, mdl, x, grad_variables="params")
    _, dot = lifted.jvp(lambda mdl, x: mdl(x), mdl, (x,), (v,), {})
    return [jax.tree.leaves(part) for part in grads], dot


def _raw(module: Linen, params: Any, x: jax.Array, v: jax.Array) -> tuple[Any, jax.Array]:
    def apply(params: Any, x: jax.Array) -> jax.Array:
        return module.apply({"params": params}, x)

    grads = jax.grad(lambda *args: jnp.sum(apply(*args).astype(x.dtype)), (0, 1))(params, x)
    _, dot = jax.jvp(lambda x: apply(params, x), (x,), (v,))
    return [jax.tree.leaves(part) for part in grads], dot


def _in_float64(module: Linen, *args: Any) -> Any:
    cpu = jax.devices("cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        args = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), args)
        return jax.tree.map(np.asarray, _raw(module, *args))


def _error(actual: Any, exact: Any) -> float:
    """The largest relative error, in norm, of the arrays of a result."""
    actual, exact = (jax.tree.leaves(jax.tree.map(np.float64, tree)) for tree in (actual, exact))
    pairs = zip(actual, exact, strict=True)
    return max(float(np.linalg.norm(a - e) / np.linalg.norm(e)) for a, e in pairs)


@functools.cache
def _programs(width: int, dtype: Any, precision: str) -> dict[str, Callable[..., Any]]:
    """The derivatives three ways, each compiled once for each shape."""
    module = Linen(width, dtype)

    def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with jax.default_matmul_precision("highest" if dtype else precision):
                return jitted(*args)

        jitted = jax.jit(fn)
        return run

    return {
        "raw": compiled(lambda p, *a: _raw(module, p, *a)),
        "Linen": compiled(lambda p, *a: _derivatives(module.bind({"params": p}), *a)),
        "NNX": compiled(lambda p, *a: _derivatives(Native(p, dtype), *a)),
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@given(
    width=st.sampled_from([16, 128]),
    batch=st.sampled_from([8, 32]),
    seed=st.integers(0, 999),
)
def test_derivatives_have_the_precision_that_was_asked_for(
    precision: str, width: int, batch: int, seed: int
) -> None:
    dtype = jnp.bfloat16 if precision == "bfloat16" else None
    x, v = normal(batch, width, seed=seed), normal(batch, width, seed=seed + 1)
    params = randomized(Linen(width).init(jax.random.key(seed), x), seed)["params"]
    found = {name: run(params, x, v) for name, run in _programs(width, dtype, precision).items()}
    assert_trees_equal(found["Linen"][1], found["raw"][1])
    exact = _in_float64(Linen(width), params, x, v)
    # bfloat16 also rounds what is between the products: biases added, tanh, its slope.
    limit = _limit(precision) * (3 if dtype else 1)
    for name, derivatives in found.items():
        assert _error(derivatives, exact) <= limit, (name, _error(derivatives, exact), limit)


@pytest.mark.skipif(ON_CPU, reason="CPUs compute float32 whatever precision is asked for")
def test_a_coarser_precision_than_asked_for_would_be_seen() -> None:
    module, x, v = Linen(256), normal(64, 256), normal(64, 256, seed=2)
    params = randomized(module.init(jax.random.key(0), x))["params"]
    with jax.default_matmul_precision("tensorfloat32"):
        coarse = jax.jit(lambda p, *a: _derivatives(module.bind({"params": p}), *a))(params, x, v)
    assert _error(coarse, _in_float64(module, params, x, v)) > _limit("highest")


def test_bfloat16_instead_of_float32_would_be_seen() -> None:
    module, x, v = Linen(64), normal(64, 64), normal(64, 64, seed=2)
    params = randomized(module.init(jax.random.key(0), x))["params"]
    coarse = _derivatives(Linen(64, jnp.bfloat16).bind({"params": params}), x, v)
    assert _error(coarse, _in_float64(module, params, x, v)) > 100 * _limit("highest")

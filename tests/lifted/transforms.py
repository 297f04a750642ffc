"""Every transform as it stands inside a method: a function of a module and an input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import lifted
from tests.helpers import call
from tests.helpers import total as _total

# For `init` and `apply`, so that the draws of two models can be compared.
RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


def input_gradient(mdl: nn.Module, x: jax.Array) -> jax.Array:
    """The gradient of the sum of the output."""
    return lifted.grad(_total, mdl, x)[0]


def vector(mdl: nn.Module, x: jax.Array) -> jax.Array:
    """A function of a module with two outputs."""
    return mdl(x).reshape(-1)[:2]


def _linearized(mdl: nn.Module, x: jax.Array) -> Any:
    y, f_jvp = lifted.linearize(call, mdl, x, grad_variables="params")
    return y, f_jvp({"params": {}}, jnp.ones_like(x))


def _vjp(mdl: nn.Module, x: jax.Array) -> Any:
    y, bwd = lifted.vjp(call, mdl, x)
    return y, bwd(y)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda mdl, x: lifted.grad(_total, mdl, x, grad_variables="params"),
    "value_and_grad": lambda mdl, x: lifted.value_and_grad(_total, mdl, x),
    "vjp": _vjp,
    "jvp": lambda mdl, x: lifted.jvp(call, mdl, (x,), (jnp.ones_like(x),), {}),
    "linearize": _linearized,
    "jacfwd": lambda mdl, x: lifted.jacfwd(vector, mdl, x),
    "jacrev": lambda mdl, x: lifted.jacrev(vector, mdl, x, grad_variables="params"),
    "hessian": lambda mdl, x: lifted.hessian(vector, mdl, x),
    "hvp": lambda mdl, x: lifted.hvp(_total, mdl, (x,), (jnp.ones_like(x),)),
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)

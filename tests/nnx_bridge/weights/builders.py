"""What the tests of weights share: variables and models given by the shapes of their arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def variables(shapes: dict[str, tuple[int, ...]], dtype: Any = jnp.float32) -> dict[str, Any]:
    """Linen variables: `{"params/Dense_0/kernel": (3, 4)}`, all of different values."""
    tree: dict[str, Any] = {}
    for seed, (path, shape) in enumerate(shapes.items()):
        *parents, name = path.split("/")
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
        # Not drawn by JAX, which would compile a program for each shape.
        drawn = np.random.default_rng(seed).normal(size=shape)
        branch[name] = jnp.asarray(drawn.astype(np.float32), dtype)
    return tree


class Linear(nnx.Module):
    """A layer of the user's own, whose kernel lies as in PyTorch."""

    def __init__(self, n: int, m: int) -> None:
        self.kernel = nnx.Param(jnp.zeros((m, n)))
        self.bias = nnx.Param(jnp.zeros(m))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...].T + self.bias


class Holder(nnx.Module):
    """Modules by name: `Holder(first=..., second=...)`."""

    def __init__(self, **modules: Any) -> None:
        for name, module in modules.items():
            setattr(self, name, module)


def dense(n: int, m: int, **kwargs: Any) -> nnx.Linear:
    """A layer of Flax."""
    return nnx.Linear(n, m, rngs=nnx.Rngs(0), **kwargs)


def partners(plan: Any) -> dict[str, str]:
    """The paths of a plan's rows as text, with the layout where there is one."""
    return {
        " + ".join("/".join(map(str, p)) for p in row.linen): " + ".join(
            "/".join(map(str, p)) for p in row.nnx
        )
        + (f" ({row.layout})" if str(row.layout) else "")
        for row in plan.rows
    }

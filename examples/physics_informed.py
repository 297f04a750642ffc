"""A physics-informed network: the heat equation from its equation and its boundary alone.

The network u(t, x) is trained so that the residual u_t - a u_xx vanishes inside, and u is what it
should be at t = 0 and at the ends of the rod. The derivatives are taken inside the module, by
`lifted.jvp`; the second one is a `jvp` of a `jvp`. The Linen and the NNX network share that code.

    python examples/physics_informed.py            # NNX
    python examples/physics_informed.py --linen
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import lifted

DIFFUSIVITY, STEPS, POINTS = 0.1, 1500, 256


def along(fn: Any, mdl: Any, t: jax.Array, x: jax.Array, *directions: Any) -> tuple[Any, Any]:
    """The value of ``fn(mdl, t, x)`` and its derivative in a direction."""
    return lifted.jvp(fn, mdl, (t, x), directions, variable_tangents={})


def residual(mdl: Any, t: jax.Array, x: jax.Array) -> jax.Array:
    """How far u_t = a u_xx is from holding at each point."""

    def u_x(mdl: Any, t: jax.Array, x: jax.Array) -> jax.Array:
        return along(type(mdl).field, mdl, t, x, None, jnp.ones_like(x))[1]

    _, u_t = along(type(mdl).field, mdl, t, x, jnp.ones_like(t), None)
    _, u_xx = along(u_x, mdl, t, x, None, jnp.ones_like(x))
    return u_t - DIFFUSIVITY * u_xx


class LinenRod(nn.Module):
    """The temperature of a rod, in Linen."""

    def setup(self) -> None:
        self.net = nn.Sequential([nn.Dense(32), jnp.tanh, nn.Dense(32), jnp.tanh, nn.Dense(1)])

    def field(self, t: jax.Array, x: jax.Array) -> jax.Array:
        return self.net(jnp.stack([t, x], -1))[..., 0]

    def residual(self, t: jax.Array, x: jax.Array) -> jax.Array:
        return residual(self, t, x)


class Rod(nnx.Module):
    """The same rod in NNX: nothing but the constructor differs."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        dense = [nnx.Linear(i, o, rngs=rngs) for i, o in ((2, 32), (32, 32), (32, 1))]
        self.net = nnx.Sequential(dense[0], jnp.tanh, dense[1], jnp.tanh, dense[2])

    def field(self, t: jax.Array, x: jax.Array) -> jax.Array:
        return self.net(jnp.stack([t, x], -1))[..., 0]

    def residual(self, t: jax.Array, x: jax.Array) -> jax.Array:
        return residual(self, t, x)


def exact(t: jax.Array, x: jax.Array) -> jax.Array:
    """The solution for u(0, x) = sin(pi x) with ends held at zero."""
    return jnp.exp(-DIFFUSIVITY * jnp.pi**2 * t) * jnp.sin(jnp.pi * x)


def loss(field: Any, residual: Any, key: jax.Array) -> jax.Array:
    """Residual inside, start, and both ends, at random points."""
    t, x = jax.random.uniform(key, (2, POINTS))
    zero = jnp.zeros_like(t)
    start = field(zero, x) - exact(zero, x)
    ends = jnp.stack([field(t, zero), field(t, zero + 1)])
    return jnp.mean(residual(t, x) ** 2) + jnp.mean(start**2) + jnp.mean(ends**2)


def train_nnx(steps: int) -> Any:
    """Trains the NNX rod and returns its field."""
    rod = Rod(nnx.Rngs(0))
    optimizer = nnx.Optimizer(rod, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(rod: Rod, optimizer: nnx.Optimizer, key: jax.Array) -> None:
        optimizer.update(rod, nnx.grad(lambda rod: loss(rod.field, rod.residual, key))(rod))

    for key in jax.random.split(jax.random.key(1), steps):
        step(rod, optimizer, key)
    return rod.field


def train_linen(steps: int) -> Any:
    """Trains the Linen rod and returns its field."""
    rod, point = LinenRod(), jnp.zeros(1)
    variables = rod.init(jax.random.key(0), point, point, method="field")
    tx = optax.adam(3e-3)

    def call(variables: Any, method: str) -> Any:
        return lambda *args: rod.apply(variables, *args, method=method)

    @jax.jit
    def step(variables: Any, state: Any, key: jax.Array) -> Any:
        grads = jax.grad(lambda v: loss(call(v, "field"), call(v, "residual"), key))(variables)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(variables, updates), state

    state = tx.init(variables)
    for key in jax.random.split(jax.random.key(1), steps):
        variables, state = step(variables, state, key)
    return call(variables, "field")


def main() -> float:
    """Trains, prints and returns the error against the exact solution."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--linen", action="store_true", help="train the Linen network")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    field = (train_linen if arguments.linen else train_nnx)(arguments.steps)
    t, x = jnp.meshgrid(jnp.linspace(0, 1, 50), jnp.linspace(0, 1, 50))
    error = float(jnp.abs(jax.jit(field)(t, x) - exact(t, x)).max())
    print(f"largest error of the temperature, which starts between 0 and 1: {error:.4f}")
    return error


if __name__ == "__main__":
    main()

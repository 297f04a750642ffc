"""A Laplace approximation: how sure is a trained network, from products with its GGN matrix.

The generalised Gauss-Newton matrix J'J of a regression network is never formed: `lifted.linearize`
gives v -> J v and `lifted.vjp` gives u -> J'u, with respect to the variables of the module, and
conjugate gradients solve with (J'J / noise^2 + prior). The predictive variance at a point is that
of the linearised network there. Far from the data it grows; that is the point of it.

    python examples/laplace.py
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.scipy.sparse.linalg import cg

import lifted

NOISE, PRIOR, STEPS = 0.1, 1.0, 2000


class Net(nnx.Module):
    """A network of one hidden layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(1, 16, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jnp.tanh(self.hidden(x)))[..., 0]


def call(net: Net, x: jax.Array) -> jax.Array:
    return net(x)


def train(net: Net, x: jax.Array, y: jax.Array, steps: int) -> None:
    """Finds the most probable parameters."""
    optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)

    def loss(net: Net) -> jax.Array:
        squares = sum(jnp.sum(p**2) for p in jax.tree.leaves(nnx.state(net, nnx.Param)))
        return jnp.sum((net(x) - y) ** 2) / (2 * NOISE**2) + PRIOR * squares / 2

    @nnx.jit
    def step(net: Net, optimizer: nnx.Optimizer) -> None:
        optimizer.update(net, nnx.grad(loss)(net))

    for _ in range(steps):
        step(net, optimizer)


def predictive_variance(net: Net, x: jax.Array, points: jax.Array) -> jax.Array:
    """The variance of the linearised network at each point, of shape (points,).

    For a point with Jacobian j it is j (J'J / noise^2 + prior)^-1 j', J being that at the data x.
    """
    _, push = lifted.linearize(call, net, x, grad_variables="params")
    _, pull = lifted.vjp(call, net, x, vjp_variables="params")

    def precision(v: Any) -> Any:
        ggn, _ = pull(push(v, None))
        return jax.tree.map(lambda g, v: g / NOISE**2 + PRIOR * v, ggn, v)

    def at(point: jax.Array) -> jax.Array:
        _, pull = lifted.vjp(call, net, point[None], vjp_variables="params")
        jacobian, _ = pull(jnp.ones(1))
        solution, _ = cg(precision, jacobian, maxiter=500)
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jacobian, solution)))

    return jax.lax.map(at, points)


def main(steps: int = STEPS) -> tuple[jax.Array, jax.Array]:
    """Prints and returns points and the standard deviations there."""
    key = jax.random.key(0)
    x = jax.random.uniform(key, (40, 1), minval=-1, maxval=1)
    y = jnp.sin(3 * x[:, 0]) + NOISE * jax.random.normal(key, (40,))
    net = Net(nnx.Rngs(0))
    train(net, x, y, steps)
    points = jnp.linspace(-3, 3, 7)[:, None]
    deviations = jnp.sqrt(nnx.jit(predictive_variance)(net, x, points))
    for point, mean, deviation in zip(points[:, 0], net(points), deviations, strict=True):
        inside = "data" if abs(point) <= 1 else ""
        print(f"x = {point:+.0f}   y = {mean:+.2f} ± {deviation:.2f}   {inside}")
    return points, deviations


if __name__ == "__main__":
    main()

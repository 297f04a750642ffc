"""Score matching: the slope of a log density, learned from samples alone.

A network s(x) is trained to be the gradient of log p(x), the score, without ever seeing p: the loss
E[v' J v + (v' s)^2 / 2], in random directions v and with the Jacobian J of s, is smallest there.
`lifted.jvp` gives s and J v in one pass, inside the module. Noise that follows the score then draws
new samples.

    python examples/score_matching.py

Source: Y. Song, S. Garg, J. Shi, S. Ermon, Sliced Score Matching, UAI 2019.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lifted

CENTRES, DEVIATION, STEPS, BATCH = jnp.array([[-1.5, 0.0], [1.5, 0.0]]), 0.6, 2000, 512


class Score(nnx.Module):
    """The score of a density over the plane."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(2, 64, rngs=rngs)
        self.deeper = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.softplus(self.deeper(nnx.softplus(self.hidden(x)))))

    def loss(self, x: jax.Array, directions: jax.Array) -> jax.Array:
        """The sliced loss for points and directions of shape (batch, 2)."""
        score, slope = lifted.jvp(Score.__call__, self, (x,), (directions,), variable_tangents={})
        curvature = jnp.sum(directions * slope, -1)
        return jnp.mean(curvature + jnp.sum(directions * score, -1) ** 2 / 2)


def samples(key: jax.Array, count: int) -> jax.Array:
    """Points of the mixture, of shape (count, 2)."""
    which, where = jax.random.split(key)
    centres = CENTRES[jax.random.randint(which, (count,), 0, len(CENTRES))]
    return centres + DEVIATION * jax.random.normal(where, (count, 2))


def exact_score(x: jax.Array) -> jax.Array:
    """The score of the mixture at each point."""

    def log_density(x: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(-jnp.sum((x - CENTRES) ** 2, -1) / (2 * DEVIATION**2))

    return jax.vmap(jax.grad(log_density))(x)


def train(steps: int) -> Score:
    """A network that was shown new samples at each step."""
    score = Score(nnx.Rngs(0))
    schedule = optax.cosine_decay_schedule(3e-3, steps)
    optimizer = nnx.Optimizer(score, optax.adam(schedule), wrt=nnx.Param)

    @nnx.jit
    def step(score: Score, optimizer: nnx.Optimizer, key: jax.Array) -> None:
        points, signs = jax.random.split(key)
        x, v = samples(points, BATCH), jax.random.rademacher(signs, (BATCH, 2), jnp.float32)
        optimizer.update(score, nnx.grad(lambda score: score.loss(x, v))(score))

    for key in jax.random.split(jax.random.key(1), steps):
        step(score, optimizer, key)
    return score


@nnx.jit(static_argnames=("count", "steps"))
def langevin(score: Score, key: jax.Array, count: int = 2000, steps: int = 500) -> jax.Array:
    """New samples: points that drift along the score, with noise."""

    def move(x: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        noise = jax.random.normal(key, x.shape)
        return x + 0.02 * score(x) + 0.2 * noise, None

    start, moves = jax.random.split(key)
    x = jax.random.normal(start, (count, 2))
    return jax.lax.scan(move, x, jax.random.split(moves, steps))[0]


def main(steps: int = STEPS) -> tuple[float, jax.Array]:
    """Prints and returns the error of the score relative to its size, and new samples."""
    score = train(steps)
    x = samples(jax.random.key(2), 2000)
    difference = score(x) - exact_score(x)
    error = float(jnp.linalg.norm(difference) / jnp.linalg.norm(exact_score(x)))
    drawn = langevin(score, jax.random.key(3))
    print(f"relative error of the score: {error:.3f}")
    for name, points in (("samples", x), ("drawn by the score", drawn)):
        deviation = ", ".join(f"{d:.2f}" for d in points.std(0))
        print(f"{name}: {jnp.mean(points[:, 0] > 0):.0%} on the right, deviations {deviation}")
    return error, drawn


if __name__ == "__main__":
    main()

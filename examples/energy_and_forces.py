"""An interatomic potential: energies whose gradients are the forces, trained on both.

Forces are minus the gradient of the energy with respect to the positions, taken inside the module
by `lifted.value_and_grad`; the loss on forces is differentiated through it, with respect to the
parameters.

    python examples/energy_and_forces.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lifted

ATOMS, FRAMES, STEPS = 6, 256, 800


class Potential(nnx.Module):
    """The energy of a cluster as a sum over pairs of atoms."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(8, 64, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 1, rngs=rngs)

    def energy(self, positions: jax.Array) -> jax.Array:
        """Energies of shape (frames,) of positions of shape (frames, atoms, 3)."""
        i, j = jnp.triu_indices(ATOMS, 1)
        distances = jnp.linalg.norm(positions[:, i] - positions[:, j], axis=-1)
        features = jnp.exp(-2 * (distances[..., None] - jnp.linspace(0.8, 2.9, 8)) ** 2)
        hidden = nnx.silu(self.second(nnx.silu(self.first(features))))
        return self.out(hidden)[..., 0].sum(-1)

    def __call__(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Energies and forces."""

        def total(self: Potential, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
            energies = self.energy(positions)
            return energies.sum(), energies

        (_, energies), (slope,) = lifted.value_and_grad(total, self, positions, has_aux=True)
        return energies, -slope


def lennard_jones(positions: jax.Array) -> jax.Array:
    """The energy that is to be learnt, of one frame."""
    i, j = jnp.triu_indices(ATOMS, 1)
    inverse = 1 / jnp.sum((positions[i] - positions[j]) ** 2, -1) ** 3
    return jnp.sum(inverse**2 - 2 * inverse)


def data(key: jax.Array, frames: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Positions around an octahedron, energies, forces."""
    octahedron = jnp.concatenate([jnp.eye(3), -jnp.eye(3)]) * 0.75
    positions = octahedron + 0.05 * jax.random.normal(key, (frames, ATOMS, 3))
    energies, slopes = jax.vmap(jax.value_and_grad(lennard_jones))(positions)
    return positions, energies, -slopes


def errors(model: Potential, frames: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """Mean squared errors of energies, up to a constant, and of forces."""
    positions, energies, forces = frames
    found, found_forces = model(positions)
    return jnp.var(found - energies), jnp.mean((found_forces - forces) ** 2)


def main(steps: int = STEPS) -> float:
    """Trains, prints and returns the error of the forces relative to their spread."""
    model = Potential(nnx.Rngs(0))
    train, test = (data(jax.random.key(seed), FRAMES) for seed in (1, 2))
    schedule = optax.cosine_decay_schedule(5e-3, steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)

    @nnx.jit
    def step(model: Potential, optimizer: nnx.Optimizer) -> None:
        grads = nnx.grad(lambda model: sum(errors(model, train)))(model)
        optimizer.update(model, grads)

    for _ in range(steps):
        step(model, optimizer)
    _, of_forces = nnx.jit(errors)(model, test)
    relative = float(jnp.sqrt(of_forces) / jnp.std(test[2]))
    print(f"error of the forces on new frames: {relative:.1%} of their spread")
    return relative


if __name__ == "__main__":
    main()

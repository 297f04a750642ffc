"""What one eager call of a transform costs on NNX, by the number of Variables.

The function that is differentiated does next to nothing, so that what remains is the handling of
the module. The baseline is raw `jax.grad` over `nnx.split` and `nnx.merge`; its time is in the
table, so that the growth can be read off.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import lifted
from benchmarks._measure import interleaved
from benchmarks._results import Table

VARIABLES = (10, 100, 1000)


class _Layers(nnx.Module):
    def __init__(self, variables: int) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(1, 1, rngs=rngs) for _ in range(variables // 2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[0](x).sum()


def _contestants(variables: int) -> dict[str, Callable[[], Any]]:
    mdl, x = _Layers(variables), jnp.ones((1, 1))

    def raw() -> Any:
        graphdef, state = nnx.split(mdl)
        return jax.grad(lambda x: nnx.merge(graphdef, state)(x))(x)

    def call(mdl: _Layers, x: jax.Array) -> jax.Array:
        return mdl(x)

    return {
        "raw JAX, NNX": raw,
        "lifted on NNX": lambda: lifted.grad(call, mdl, x),
        "flax.nnx": lambda: nnx.grad(call, argnums=1)(mdl, x),
    }


def run(rounds: int = 40) -> Table:
    """The table of eager calls."""
    table = Table("eager", "One eager gradient of a module, by its number of Variables")
    for variables in VARIABLES:
        contestants = _contestants(variables)
        baseline = next(iter(contestants))
        ratios, seconds = interleaved(
            contestants, baseline, rounds, f"{variables} Variables", time.process_time
        )
        for name, ratio in ratios.items():
            table.add(f"{variables} Variables", name, baseline, ratio, seconds)
    return table

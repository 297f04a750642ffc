"""Gradients of intermediates: one call against the recipe of four steps.

The claims: the compiled program runs in at most the time of the recipe's (1.0, and what the machine
adds), and takes less time to get from Python to a compiled program.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

import nnx_bridge
from benchmarks._measure import interleaved
from benchmarks._models import LAYERS, NNXBlock, sample
from benchmarks._results import Table


class _Perturbed(nnx.Module):
    """The encoder, with a perturbation and a sown value after every block."""

    def __init__(self) -> None:
        self.blocks = nnx.List([NNXBlock(nnx.Rngs(i)) for i in range(LAYERS)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for i, block in enumerate(self.blocks):
            x = self.perturb(f"block_{i}", block(x))
            self.sow(nnx.Intermediate, f"output_{i}", x)
        return x


def _loss(mdl: nnx.Module, x: jax.Array) -> jax.Array:
    return (mdl(x) ** 2).sum()


def _recipe(mdl: nnx.Module, x: jax.Array) -> Any:
    _, perturbations = nnx.capture(mdl, nnx.Perturbation)(x)

    def loss(mdl: nnx.Module, perturbations: nnx.State, x: jax.Array) -> Any:
        return nnx.capture(_loss, nnx.Intermediate, init=perturbations)(mdl, x)

    return nnx.grad(loss, argnums=(0, 1, 2), has_aux=True)(mdl, perturbations, x)


def _one_call(mdl: nnx.Module, x: jax.Array) -> Any:
    result = nnx_bridge.capture_grad(_loss, mdl, x)
    return result.grads, result.intermediate_grads, result.intermediates


def run(rounds: int = 20) -> Table:
    """The table of run and compile times."""
    graphdef, state = nnx.split(_Perturbed())
    x = sample()

    def functional(call: Callable[..., Any]) -> Callable[[nnx.State, jax.Array], Any]:
        return lambda state, x: jax.tree.leaves(call(nnx.merge(graphdef, state), x))

    def compiling(call: Callable[..., Any]) -> Callable[[], Any]:
        # A new function each time: JAX remembers programs by the function object.
        return lambda: jax.jit(functional(call)).lower(state, x).compile() and None

    table = Table("intermediates", "Gradients of intermediates: one call against the recipe")
    calls = {"recipe": _recipe, "capture_grad": _one_call}
    compiled = {name: jax.jit(functional(call)) for name, call in calls.items()}
    run_calls = {name: lambda f=f: f(state, x) for name, f in compiled.items()}
    ratios, seconds = interleaved(run_calls, "recipe", 10 * rounds, "running")
    for name, ratio in ratios.items():
        table.add("run", name, "recipe", ratio, seconds, 1.02 if name == "capture_grad" else None)
    compile_calls = {name: compiling(call) for name, call in calls.items()}
    ratios, seconds = interleaved(
        compile_calls, "recipe", rounds, "tracing and compiling", time.process_time
    )
    for name, ratio in ratios.items():
        claim = 1.0 if name == "capture_grad" else None
        table.add("trace and compile", name, "recipe", ratio, seconds, claim)
    return table

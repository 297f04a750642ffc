"""What Linen's lifted transforms on NNX cost while the program is traced.

The gradient of the 12 layers of a transformer in a loop, an ensemble of transformers under `vmap`,
and one under `remat`. The baseline is raw JAX over the hand-written pure function: ``nnx.split``
and ``nnx.merge``. The claim: at most 1.05 times raw JAX. Beside it stand Flax's own: `flax.nnx` on
the same modules, and `flax.linen` on the same layers in Linen. What is timed is the processor time
of the process, as in `benchmarks.tracing`.

The forward pass of the loop alone stands here without a claim: one small layer is traced in a few
milliseconds, of which what a lifted call does before and after is not a small part.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
from flax import linen, nnx

import nnx_bridge as nn
from benchmarks._measure import interleaved
from benchmarks._models import LAYERS, LinenBlock, LinenEncoder, NNXBlock, NNXEncoder, sample
from benchmarks._results import Table
from benchmarks.tracing import NNX_CLAIM, traced

ENSEMBLE = 4
BASELINE, OURS = "raw JAX, NNX", "nnx_bridge"
STACKED: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


def _step(mdl: Any, x: jax.Array) -> tuple[jax.Array, None]:
    return mdl(x), None


def _call(mdl: Any, x: jax.Array) -> jax.Array:
    return mdl(x)


class _LinenStep(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        return LinenBlock()(x), None


def _raw(transform: str, mdl: Any, x: jax.Array) -> Any:
    graphdef, state = nnx.split(mdl)

    def call(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(x)

    if transform == "scan":
        return jax.lax.scan(lambda x, state: (call(state, x), None), x, state)
    if transform == "vmap":
        return jax.vmap(call, in_axes=(0, None))(state, x)
    return jax.checkpoint(call)(state, x)


# How each package writes the transforms, as functions of a module and an input.
_OURS: dict[str, Callable[[Any, jax.Array], Any]] = {
    "scan": nn.scan(_step, **STACKED),
    "vmap": nn.vmap(_call, in_axes=None, **STACKED),
    "remat": nn.remat(_call),
}
_NNX: dict[str, Callable[[Any, jax.Array], Any]] = {
    "scan": lambda mdl, x: nnx.scan(
        lambda x, mdl: mdl(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )(x, mdl),
    "vmap": lambda mdl, x: nnx.vmap(_call, in_axes=(0, None))(mdl, x),
    "remat": lambda mdl, x: nnx.remat(_call)(mdl, x),
}
_LINEN: dict[str, linen.Module] = {
    "scan": linen.scan(_LinenStep, length=LAYERS, **STACKED)(),
    "vmap": linen.vmap(LinenEncoder, in_axes=None, axis_size=ENSEMBLE, **STACKED)(),
    "remat": linen.remat(LinenEncoder)(),
}


def _contestants(transform: str, gradient: bool = False) -> dict[str, Callable[[], Any]]:
    x, rngs = sample(), nnx.Rngs(0)
    kind, size = {"scan": (NNXBlock, LAYERS), "vmap": (NNXEncoder, ENSEMBLE)}.get(
        transform, (NNXEncoder, None)
    )
    make = nnx.split_rngs(splits=size)(nnx.vmap(kind)) if size else kind
    graphdef, state = nnx.split(make(rngs))

    def with_module(call: Callable[[Any, jax.Array], Any]) -> Callable[[], Any]:
        return program(lambda state, x: call(nnx.merge(graphdef, state), x), state, x)

    def program(call: Callable[..., Any], values: Any, x: jax.Array) -> Callable[[], Any]:
        if not gradient:
            return traced(call, values, x)
        return traced(jax.grad(lambda values, x: call(values, x)[0].sum()), values, x)

    module = _LINEN[transform]
    variables = module.init(jax.random.key(0), x)
    return {
        BASELINE: with_module(lambda mdl, x: _raw(transform, mdl, x)),
        OURS: with_module(_OURS[transform]),
        "flax.nnx": with_module(_NNX[transform]),
        "flax.linen": program(module.apply, variables, x),
    }


def run(rounds: int = 40) -> Table:
    """The table of trace times."""
    table = Table("lifted_transforms", "Tracing transformers with a lifted transform on NNX")
    for transform, gradient in (("scan", True), ("vmap", False), ("remat", False), ("scan", False)):
        what = f"gradient of {transform}" if gradient else transform
        contestants = _contestants(transform, gradient)
        ratios, seconds = interleaved(contestants, BASELINE, rounds, what, time.process_time)
        for name, ratio in ratios.items():
            claimed = name == OURS and (gradient or transform != "scan")
            table.add(what, name, BASELINE, ratio, seconds, NNX_CLAIM if claimed else None)
    return table

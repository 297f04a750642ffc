"""A hosted Linen model costs what Linen's own `apply` costs; flax's `ToNNX` for comparison."""

import time
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from benchmarks._measure import interleaved
from benchmarks._models import LinenEncoder, sample
from benchmarks._results import Table
from nnx_bridge import Host

# The most that a hosted model may take, as a multiple of Linen's `apply`.
CLAIM = 1.05


class WithStatistics(nn.Module):
    """The encoder, and statistics that every call moves."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=False)(LinenEncoder()(x))


def _calls(module: nn.Module, x: jax.Array) -> dict[str, Callable[[], Any]]:
    key = jax.random.key(0)
    variables = module.init(key, x)
    mutable = [name for name in variables if name != "params"]
    host = Host(module, variables)
    to_nnx = nnx.bridge.ToNNX(module).lazy_init(x, rngs=key)
    return {
        "Linen apply": lambda: module.apply(variables, x, mutable=mutable),
        "Host": lambda: host(x),
        "nnx.bridge.ToNNX": lambda: to_nnx(x, mutable=mutable),
    }


def _traced(call: Callable[[], Any]) -> Callable[[], Any]:
    def trace() -> None:
        # A new function each time: JAX keeps the trace of one that it has seen.
        jax.make_jaxpr(lambda: call())()

    return trace


def run(rounds: int = 30) -> Table:
    """The table of a call, traced and eager."""
    traced = {name: _traced(call) for name, call in _calls(LinenEncoder(), sample()).items()}
    contestants = {"tracing": traced, "eager call": _calls(WithStatistics(), sample())}
    table = Table("host", "A 12-layer Linen transformer hosted as NNX")
    for what, programs in contestants.items():
        ratios, seconds = interleaved(programs, "Linen apply", rounds, what, time.process_time)
        for name, ratio in ratios.items():
            table.add(what, name, "Linen apply", ratio, seconds, CLAIM if name == "Host" else None)
    return table

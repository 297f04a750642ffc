"""A hosted Linen model costs what Linen's own `apply` costs; flax's `ToNNX` for comparison."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from benchmarks._measure import Ratio, interleaved
from benchmarks._models import LinenEncoder, sample
from benchmarks._results import Table
from nnx_bridge import Host

# The most that a hosted model may take of Linen's `apply`, in the median over MODELS.
CLAIM = 1.05


class Perceptron(nn.Module):
    """Few and cheap layers: what a host adds to a call weighs most here."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(4):
            x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(1)(x)


class Convolutional(nn.Module):
    """Statistics that every call moves."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (8, 16, 16):
            x = nn.Conv(width, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        return x.mean((1, 2))


class Layer(nn.Module):
    """One step of `Scanned`."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return x + nn.Dense(32)(nn.LayerNorm()(x)), None


class Scanned(nn.Module):
    """Layers under `nn.scan`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(Layer, length=8, **axes)()(x, None)[0]


MODELS: Mapping[str, tuple[nn.Module, Callable[[], jax.Array]]] = {
    "dense layer": (nn.Dense(32), lambda: jnp.ones((4, 32))),
    "perceptron": (Perceptron(), lambda: jnp.ones((4, 32))),
    "convolutions with statistics": (Convolutional(), lambda: jnp.ones((2, 8, 8, 3))),
    "recurrent": (nn.RNN(nn.LSTMCell(16)), lambda: jnp.ones((2, 6, 16))),
    "scanned layers": (Scanned(), lambda: jnp.ones((4, 32))),
    "attention": (nn.MultiHeadDotProductAttention(4), sample),
    "transformer of 12 layers": (LinenEncoder(), sample),
}


def _calls(module: nn.Module, x: jax.Array) -> dict[str, Callable[[], Any]]:
    key = jax.random.key(0)
    variables = module.init(key, x)
    mutable = [name for name in variables if name != "params"] or False
    host = Host(module, variables)
    host(x)  # The first call takes note of the submodules.
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
    """The table of calls, traced and eager, for each model and in the median over them."""
    table = Table("host", "Linen models hosted as NNX")
    for what in ("tracing", "eager call"):
        ratios: dict[str, list[Ratio]] = {}
        times = []
        for name, (module, inputs) in MODELS.items():
            calls = _calls(module, inputs())
            if what == "tracing":
                if module is MODELS["convolutions with statistics"][0]:
                    continue  # A trace that closes over a model cannot move its statistics.
                calls = {contestant: _traced(call) for contestant, call in calls.items()}
            case = f"{what}, {name}"
            of_model, seconds = interleaved(calls, "Linen apply", rounds, case, time.process_time)
            times.append(seconds)
            for contestant, ratio in of_model.items():
                table.add(case, contestant, "Linen apply", ratio, seconds, None)
                ratios.setdefault(contestant, []).append(ratio)
        for contestant, of_models in ratios.items():
            claim = CLAIM if contestant == "Host" else None
            seconds = sorted(times)[len(times) // 2]
            summary = f"{what}, median over {len(of_models)} models"
            table.add(summary, contestant, "Linen apply", _median(of_models), seconds, claim)
    return table


def _median(ratios: list[Ratio]) -> Ratio:
    """The model in the middle."""
    return sorted(ratios, key=lambda ratio: ratio.median)[len(ratios) // 2]

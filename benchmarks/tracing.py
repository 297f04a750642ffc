"""What a transform inside the forward pass costs while the program is traced.

A 12-layer transformer encoder is differentiated inside the forward pass of an outer model, and the
outer model is traced. The baseline is raw JAX over the hand-written pure function of the encoder:
``apply`` in Linen, ``nnx.split`` and ``nnx.merge`` in NNX, a closure in Equinox. The claim: at most
1.03 times raw JAX for `lifted` on Linen, and at most 1.05 times on NNX. What is timed is the
processor time of the process, which other work on the machine disturbs less than time on the wall.
"""

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from flax import linen as nn
from flax import nnx

import lifted
from benchmarks._measure import interleaved
from benchmarks._models import EquinoxEncoder, LinenEncoder, NNXEncoder, sample
from benchmarks._results import Table

LINEN_CLAIM, NNX_CLAIM = 1.03, 1.05


def _total(mdl: Any, x: jax.Array) -> jax.Array:
    return mdl(x).sum()


def _output(mdl: Any, x: jax.Array) -> jax.Array:
    return mdl(x)


class _Outer(nn.Module):
    """A Linen model that differentiates its encoder by the given call."""

    call: Callable[[nn.Module, jax.Array], Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        return self.call(LinenEncoder(name="encoder"), x)


def traced(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Traces ``fn`` anew at each call; JAX remembers programs by the function object."""

    def trace() -> None:
        jax.make_jaxpr(lambda *args: fn(*args))(*args)

    return trace


def _linen(transform: str) -> dict[str, Callable[[], Any]]:
    x = sample()
    encoder = LinenEncoder()
    variables = encoder.init(jax.random.key(0), x)
    wrapped = {"params": {"encoder": variables["params"]}}

    def raw(variables: Any, x: jax.Array) -> Any:
        def apply(x: jax.Array) -> jax.Array:
            return encoder.apply(variables, x)

        if transform == "jvp":
            return jax.jvp(apply, (x,), (x,))
        return jax.grad(lambda x: apply(x).sum())(x)

    calls: dict[str, Callable[[nn.Module, jax.Array], Any]] = {
        "lifted on Linen": lambda mdl, x: lifted.jvp(_output, mdl, (x,), (x,), {}),
        "flax.linen": lambda mdl, x: nn.jvp(_output, mdl, (x,), (x,), {}),
    }
    if transform == "grad":
        calls = {
            "lifted on Linen": lambda mdl, x: lifted.grad(_total, mdl, x),
            "flax.linen": lambda mdl, x: nn.grad(_total, mdl, x),
        }
    contestants = {"raw JAX, Linen": traced(raw, variables, x)}
    for name, call in calls.items():
        contestants[name] = traced(_Outer(call).apply, wrapped, x)
    return contestants


def _nnx(transform: str) -> dict[str, Callable[[], Any]]:
    x = sample()
    graphdef, state = nnx.split(NNXEncoder(nnx.Rngs(0)))

    def raw(mdl: NNXEncoder, x: jax.Array) -> Any:
        inner_graphdef, inner_state = nnx.split(mdl)

        def apply(x: jax.Array) -> jax.Array:
            return nnx.merge(inner_graphdef, inner_state)(x)

        if transform == "jvp":
            return jax.jvp(apply, (x,), (x,))
        return jax.grad(lambda x: apply(x).sum())(x)

    def with_module(call: Callable[[Any, jax.Array], Any]) -> Callable[[], Any]:
        return traced(lambda state, x: call(nnx.merge(graphdef, state), x), state, x)

    contestants = {"raw JAX, NNX": with_module(raw)}
    if transform == "jvp":
        contestants["lifted on NNX"] = with_module(
            lambda mdl, x: lifted.jvp(_output, mdl, (x,), (x,), {})
        )
    else:
        contestants["lifted on NNX"] = with_module(lambda mdl, x: lifted.grad(_total, mdl, x))
        contestants["flax.nnx"] = with_module(lambda mdl, x: nnx.grad(_total, argnums=1)(mdl, x))
    return contestants


def _equinox(transform: str) -> dict[str, Callable[[], Any]]:
    x = sample()
    params, static = eqx.partition(EquinoxEncoder(jax.random.key(0)), eqx.is_array)

    def raw(params: Any, x: jax.Array) -> Any:
        def apply(x: jax.Array) -> jax.Array:
            return eqx.combine(params, static)(x)

        if transform == "jvp":
            return jax.jvp(apply, (x,), (x,))
        return jax.grad(lambda x: apply(x).sum())(x)

    def filtered(params: Any, x: jax.Array) -> Any:
        mdl = eqx.combine(params, static)
        if transform == "jvp":
            return eqx.filter_jvp(lambda x: mdl(x), (x,), (x,))
        return eqx.filter_grad(lambda x: mdl(x).sum())(x)

    return {
        "raw JAX, Equinox": traced(raw, params, x),
        "equinox.filter_*": traced(filtered, params, x),
    }


def run(rounds: int = 40) -> Table:
    """The table of trace times."""
    table = Table("tracing", "Tracing a 12-layer transformer with a transform in its forward pass")
    for transform in ("jvp", "grad"):
        for contestants in (_linen(transform), _nnx(transform), _equinox(transform)):
            baseline = next(iter(contestants))
            ratios, seconds = interleaved(
                contestants, baseline, rounds, f"{transform}, {baseline}", time.process_time
            )
            for name, ratio in ratios.items():
                claim = {"lifted on Linen": LINEN_CLAIM, "lifted on NNX": NNX_CLAIM}.get(name)
                table.add(transform, name, baseline, ratio, seconds, claim)
    return table

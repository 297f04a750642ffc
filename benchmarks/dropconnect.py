"""Time and memory of DropConnect against a plain linear layer.

Rules: `nnx.Linear`; the published DropConnect (a 32-bit `jax.random.bernoulli` draw for each
weight, and a product); `nnx.Dropout` on the activations; and `DropConnectLinear` with each
generator. Before anything is timed, each generator's layer is checked against its mask written out.
Memory is read off the compiled programs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import layers
from benchmarks._measure import Ratio, interleaved
from benchmarks._results import Table

RATE = 0.25
SIDE = 1024
BATCHES = (32, 256, 1024)
PASSES = ("forward", "forward and backward")
GENERATORS = ("default", "fast", "bernoulli")
PLAIN = "nnx.Linear"

# Times that are promised on CPU, by batch: (default forward, default both, fast forward).
TIME_CLAIMS = {32: (4.0, 1.8, 1.3), 256: (1.7, 1.3, 1.15), 1024: (1.3, 1.1, 1.1)}
# Beyond the plain layer, in kernels: one masked kernel, and where bits are stored, one a weight.
MEMORY_CLAIMS = {"default": 1.0 + 1 / 32, "fast": 1.0, "bernoulli": 1.0 + 1 / 32}
PER_EXAMPLE_CLAIM = 1.25
_SLACK = 1024 / (4 * SIDE * SIDE)  # a key and a few scalars, in kernels

Program = Callable[..., Any]


class _Published(nnx.Module):
    """A Boolean mask from `jax.random.bernoulli`, multiplied in; not rescaled."""

    def __init__(self, linear: nnx.Linear) -> None:
        self.linear = linear

    def __call__(self, x: jax.Array, *, rngs: jax.Array) -> jax.Array:
        kernel = self.linear.kernel[...]
        mask = jax.random.bernoulli(rngs, 1 - RATE, kernel.shape)
        return x @ (kernel * mask) + self.linear.bias[...]


class _Dropped(nnx.Module):
    """Dropout of the inputs, then the plain layer."""

    def __init__(self, linear: nnx.Linear) -> None:
        self.linear, self.dropout = linear, nnx.Dropout(RATE)

    def __call__(self, x: jax.Array, *, rngs: jax.Array) -> jax.Array:
        return self.linear(self.dropout(x, rngs=rngs))


class _Plain(nnx.Module):
    def __init__(self, linear: nnx.Linear) -> None:
        self.linear = linear

    def __call__(self, x: jax.Array, *, rngs: jax.Array) -> jax.Array:
        del rngs
        return self.linear(x)


def _rules() -> dict[str, nnx.Module]:
    linear = nnx.Linear(SIDE, SIDE, rngs=nnx.Rngs(0))
    rules: dict[str, nnx.Module] = {
        PLAIN: _Plain(linear),
        "published": _Published(linear),
        "nnx.Dropout": _Dropped(linear),
    }
    for generator in GENERATORS:
        rules[generator] = layers.DropConnectLinear(linear, RATE, generator=generator)
    if jax.default_backend() != "cpu":
        rules["fused"] = layers.DropConnectLinear(linear, RATE, generator="fast", fused=True)
    return rules


def _compiled(rule: nnx.Module, direction: str, batch: int) -> tuple[Any, tuple[Any, ...]]:
    """The program of one pass, and its arguments."""
    graphdef, state = nnx.split(rule)
    x, cotangent = jax.random.normal(jax.random.key(1), (2, batch, SIDE))

    def forward(state: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(x, rngs=key)

    def loss(state: Any, x: jax.Array, key: jax.Array, cotangent: jax.Array) -> jax.Array:
        return (forward(state, x, key) * cotangent).sum()

    args = (state, x, jax.random.key(2))
    program: Program = forward
    if direction != "forward":
        program, args = jax.grad(loss, argnums=(0, 1)), (*args, cotangent)
    return jax.jit(program).lower(*args).compile(), args


def _check(rules: dict[str, nnx.Module]) -> None:
    x, key = jax.random.normal(jax.random.key(1), (8, SIDE)), jax.random.key(2)
    for generator in GENERATORS:
        layer: Any = rules[generator]
        mask = layers.keep_mask(key, layer.kernel.shape, RATE, generator=generator)
        kernel = jnp.where(mask, layer.kernel[...] / (1 - RATE), 0)
        expected = x @ kernel + layer.bias[...]
        np.testing.assert_allclose(layer(x, rngs=key), expected, rtol=1e-4, atol=1e-4)


def _time_claim(name: str, direction: str, batch: int) -> float | None:
    if jax.default_backend() != "cpu":
        return None
    forward, both, fast = TIME_CLAIMS[batch]
    if direction == "forward":
        return {"default": forward, "fast": fast}.get(name)
    return both if name == "default" else None


def _add_pass(table: Table, direction: str, batch: int, rounds: int) -> None:
    compiled = {name: _compiled(rule, direction, batch) for name, rule in _rules().items()}
    contestants = {
        name: lambda program=program, args=args: program(*args)
        for name, (program, args) in compiled.items()
    }
    what = f"{direction}, batch {batch}"
    ratios, seconds = interleaved(contestants, PLAIN, rounds, what)
    for name, ratio in ratios.items():
        table.add(what, name, PLAIN, ratio, seconds, _time_claim(name, direction, batch))
    if batch == max(BATCHES):
        _add_memory(table, direction, {name: program for name, (program, _) in compiled.items()})


def _add_memory(table: Table, direction: str, programs: dict[str, Any]) -> None:
    plain = _temporaries(programs[PLAIN])
    for name in ("published", *GENERATORS):
        kernels = (_temporaries(programs[name]) - plain) / (4 * SIDE * SIDE)
        claim = MEMORY_CLAIMS.get(name)
        table.add(
            f"memory beyond plain, {direction}",
            name,
            "one kernel",
            Ratio.exact(kernels),
            claim=None if claim is None else claim + _SLACK,
        )


def _temporaries(program: Any) -> int:
    return int(program.memory_analysis().temp_size_in_bytes)


def _add_per_example(table: Table, direction: str, batch: int = 64) -> None:
    """Memory of the whole program with a mask per example over that with one mask."""
    linear = nnx.Linear(SIDE, SIDE, rngs=nnx.Rngs(0))
    for generator in ("default", "fast"):
        sizes = []
        for per_example in (True, False):
            layer = layers.DropConnectLinear(
                linear, RATE, generator=generator, per_example=per_example
            )
            used = _compiled(layer, direction, batch)[0].memory_analysis()
            sizes.append(
                used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes
            )
        table.add(
            f"memory, {direction}",
            f"{generator}, masks per example",
            f"{generator}, one mask",
            Ratio.exact(sizes[0] / sizes[1]),
            claim=PER_EXAMPLE_CLAIM,
        )


def run(rounds: int = 60) -> Table:
    """The table of times and memory."""
    _check(_rules())
    table = Table("dropconnect", f"DropConnect, kernel {SIDE}×{SIDE}, float32, rate {RATE}")
    for batch in BATCHES:
        for direction in PASSES:
            _add_pass(table, direction, batch, rounds)
    for direction in PASSES:
        _add_per_example(table, direction)
    return table

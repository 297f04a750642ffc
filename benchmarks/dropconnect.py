"""Time and memory of DropConnect against a plain linear layer.

Every rule is compiled once and then run in turn, in a new order each round, so that whatever else
the machine does falls on all alike.  The ratio of a rule is the median over rounds of its time over
that of `nnx.Linear` in the same round.  Memory is read off the compiled program.

Rules: `nnx.Linear`; the published DropConnect (a 32-bit `jax.random.bernoulli` draw for each
weight, and a product); `nnx.Dropout` on the activations; and `DropConnectLinear` with each
generator.  Before anything is timed, each rule's result is checked against its mask written out.

    python benchmarks/dropconnect.py                            # prints the table
    python benchmarks/dropconnect.py --save benchmarks/results  # and keeps it, with a plot
"""

import argparse
import os
import pathlib
import platform
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import layers

RATE = 0.25
LIMITS = {  # ratios that the package promises on CPU: (forward, forward and backward)
    ("default", 32): (4.0, 1.8),
    ("default", 256): (1.7, 1.3),
    ("default", 1024): (1.3, 1.1),
    ("fast", 32): (1.3, None),
    ("fast", 256): (1.15, None),
    ("fast", 1024): (1.1, None),
}


class Row(NamedTuple):
    batch: int
    mode: str
    rule: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    kernels: float  # temporary memory beyond plain, in kernels
    limit: float | None


class Published(nnx.Module):
    """A Boolean mask from `jax.random.bernoulli`, multiplied in; not rescaled."""

    def __init__(self, linear: nnx.Linear):
        self.linear = linear

    def __call__(self, x: jax.Array, *, rngs: jax.Array) -> jax.Array:
        kernel = self.linear.kernel[...]
        mask = jax.random.bernoulli(rngs, 1 - RATE, kernel.shape)
        return x @ (kernel * mask) + self.linear.bias[...]


class Dropped(nnx.Module):
    """Dropout of the inputs, then the plain layer."""

    def __init__(self, linear: nnx.Linear):
        self.linear, self.dropout = linear, nnx.Dropout(RATE)

    def __call__(self, x: jax.Array, *, rngs: jax.Array) -> jax.Array:
        return self.linear(self.dropout(x, rngs=rngs))


class Plain(nnx.Module):
    def __init__(self, linear: nnx.Linear):
        self.linear = linear

    def __call__(self, x: jax.Array, *, rngs: jax.Array) -> jax.Array:
        del rngs
        return self.linear(x)


def build(side: int) -> dict[str, nnx.Module]:
    linear = nnx.Linear(side, side, rngs=nnx.Rngs(0))
    rules: dict[str, nnx.Module] = {
        "nnx.Linear": Plain(linear),
        "published": Published(linear),
        "nnx.Dropout": Dropped(linear),
    }
    for generator in ("default", "fast", "bernoulli"):
        rules[generator] = layers.DropConnectLinear(linear, RATE, generator=generator)
    if jax.default_backend() != "cpu":
        rules["fused"] = layers.DropConnectLinear(linear, RATE, generator="fast", fused=True)
    return rules


def functions(rule: nnx.Module, mode: str) -> Callable[..., Any]:
    graphdef = nnx.graphdef(rule)

    def forward(state: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(x, rngs=key)

    if mode == "forward":
        return forward

    def loss(state: Any, x: jax.Array, key: jax.Array, cotangent: jax.Array) -> jax.Array:
        return (forward(state, x, key) * cotangent).sum()

    return jax.grad(loss, argnums=(0, 1))


def check(rules: dict[str, nnx.Module], x: jax.Array, key: jax.Array) -> None:
    """Every generator's layer against its mask written out."""
    for generator in ("default", "fast", "bernoulli"):
        layer = rules[generator]
        mask = layers.keep_mask(key, layer.kernel.shape, RATE, generator=generator)
        kernel = jnp.where(mask, layer.kernel[...] / (1 - RATE), 0)
        np.testing.assert_allclose(
            layer(x, rngs=key), x @ kernel + layer.bias[...], rtol=1e-4, atol=1e-4
        )


def measure(side: int, batch: int, mode: str, rounds: int) -> list[Row]:
    rules = build(side)
    x, cotangent = jax.random.normal(jax.random.key(1), (2, batch, side))
    key = jax.random.key(2)
    check(rules, x, key)
    args = (x, key) if mode == "forward" else (x, key, cotangent)
    programs, memory = {}, {}
    for name, rule in rules.items():
        state = nnx.state(rule)
        compiled = jax.jit(functions(rule, mode)).lower(state, *args).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        programs[name] = lambda compiled=compiled, state=state: compiled(state, *args)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(rounds + 3):
        for name in random.sample(list(programs), len(programs)):
            start = time.perf_counter()
            jax.block_until_ready(programs[name]())
            if i >= 3:  # the first rounds warm up
                times[name].append(time.perf_counter() - start)
    return [row(side, batch, mode, name, times, memory) for name in programs]


def row(side: int, batch: int, mode: str, name: str, times: Any, memory: Any) -> Row:
    ratios = sorted(a / b for a, b in zip(times[name], times["nnx.Linear"], strict=True))
    low, ratio, high = statistics.quantiles(ratios, n=4)
    limits = LIMITS.get((name, batch), (None, None))
    kernels = (memory[name] - memory["nnx.Linear"]) / (4 * side * side)
    milliseconds = 1e3 * statistics.median(times[name])
    return Row(
        batch, mode, name, milliseconds, ratio, low, high, kernels, limits[mode != "forward"]
    )


def per_example_memory(side: int, batch: int) -> list[tuple[str, str, float]]:
    """Arguments, results and temporaries of masks per example over those of a shared mask."""
    linear = nnx.Linear(side, side, rngs=nnx.Rngs(0))
    x, key = jnp.ones((batch, side)), jax.random.key(0)
    results = []
    for generator in ("default", "fast"):
        for mode in ("forward", "forward+backward"):
            total = []
            for per_example in (True, False):
                layer = layers.DropConnectLinear(
                    linear, RATE, generator=generator, per_example=per_example
                )
                args = (x, key) if mode == "forward" else (x, key, jnp.ones((batch, side)))
                program = jax.jit(functions(layer, mode)).lower(nnx.state(layer), *args)
                m = program.compile().memory_analysis()
                total.append(
                    m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes
                )
            results.append((generator, mode, total[0] / total[1]))
    return results


def hardware() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    name = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        models = [x.split(":")[1] for x in info.read_text().splitlines() if "model name" in x]
        name = models[0].strip() if models else name
    return f"{name}, {os.cpu_count()} cores"


def report(rows: list[Row], examples: list[tuple[str, str, float]], side: int, rounds: int) -> str:
    lines = [
        "# DropConnect: time and memory",
        "",
        f"Kernel {side}×{side}, float32, rate {RATE}; {rounds} interleaved rounds; {hardware()}; "
        f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}.",
        "",
        "Ratio: median over rounds of the time over that of `nnx.Linear` in the same round, "
        "with quartiles. Memory: temporaries beyond plain, in kernels. Limit: what the package "
        "promises.",
        "",
        "| batch | pass | rule | ms (median) | ratio | quartiles | memory | limit | |",
        "|---:|---|---|---:|---:|---|---:|---:|---|",
    ]
    for r in rows:
        limit = "" if r.limit is None else f"{r.limit}"
        verdict = "" if r.limit is None else ("met" if r.ratio <= r.limit else "**missed**")
        lines.append(
            f"| {r.batch} | {r.mode} | {r.rule} | {r.milliseconds:.2f} | {r.ratio:.2f} | "
            f"{r.low:.2f} to {r.high:.2f} | {r.kernels:.2f} | {limit} | {verdict} |"
        )
    lines += [
        "",
        "Masks per example: memory of the whole program (arguments, results, temporaries) over "
        "that with one shared mask; limit 1.25.",
        "",
        "| generator | pass | ratio |",
        "|---|---|---:|",
        *(f"| {generator} | {mode} | {ratio:.2f} |" for generator, mode, ratio in examples),
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = list(dict.fromkeys(r.mode for r in rows))
    figure, axes = plt.subplots(1, len(modes), figsize=(5 * len(modes), 3.6), squeeze=False)
    for axis, mode in zip(axes[0], modes, strict=True):
        names = [n for n in dict.fromkeys(r.rule for r in rows) if n != "nnx.Linear"]
        batches = sorted({r.batch for r in rows})
        for i, name in enumerate(names):
            chosen = [r for r in rows if r.mode == mode and r.rule == name]
            spread = np.array([[r.ratio - r.low, r.high - r.ratio] for r in chosen]).T
            at = np.arange(len(batches)) + (i - len(names) / 2 + 0.5) * 0.8 / len(names)
            axis.bar(at, [r.ratio for r in chosen], 0.8 / len(names), yerr=spread, label=name)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(batches)), batches)
        axis.set(xlabel="batch", ylabel="time / nnx.Linear", title=mode)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=1024, help="rows and columns of the kernel")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 256, 1024])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--save", type=pathlib.Path, help="folder for dropconnect.md and .png")
    options = parser.parse_args()
    rows = [
        row
        for batch in options.batches
        for mode in ("forward", "forward+backward")
        for row in measure(options.side, batch, mode, options.rounds)
    ]
    examples = per_example_memory(options.side, 64)
    text = report(rows, examples, options.side, options.rounds)
    print(text)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "dropconnect.md").write_text(text)
        plot(rows, options.save / "dropconnect.png")


if __name__ == "__main__":
    main()

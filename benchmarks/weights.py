"""Matching the parameters of a Linen model with those of an NNX rewrite that has other names."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks._measure import Ratio, interleaved
from benchmarks._results import Table
from nnx_bridge import match

# What is claimed of the largest model, in seconds, and of the growth of time with the number of
# parameters: n² log n, of which from 1,000 to 10,000 the exponent is 2 + log10(4/3).
SECONDS = 10.0
EXPONENT = 2 + math.log10(math.log(10_000) / math.log(1_000))

# Parameters of one layer.
_LAYER = 16
_WIDTH = 64
_HEADS = (4, 16)


def _attention(names: dict[str, str]) -> dict[str, tuple[int, ...]]:
    kernel, bias = (_WIDTH, *_HEADS), _HEADS
    shapes = {name: (kernel, bias) for name in ("query", "key", "value")}
    shapes["out"] = ((*_HEADS, _WIDTH), (_WIDTH,))
    return {
        f"{names[name]}/{leaf}": shape
        for name, both in shapes.items()
        for leaf, shape in zip(("kernel", "bias"), both, strict=True)
    }


def _layer(attention: str, names: str, dense: tuple[str, str], norm: tuple[str, str]) -> Any:
    projections = dict(zip(("query", "key", "value", "out"), names.split(), strict=True))
    shapes = {f"{attention}/{path}": s for path, s in _attention(projections).items()}
    for name in dense:
        shapes |= {f"{name}/kernel": (_WIDTH, _WIDTH), f"{name}/bias": (_WIDTH,)}
    for name in norm:
        shapes |= {f"{name}/scale": (_WIDTH,), f"{name}/bias": (_WIDTH,)}
    return shapes


def _models(parameters: int) -> tuple[Any, nnx.State]:
    """Linen variables and an NNX state of equal encoders, whose parameters have other names."""
    linen = _layer(
        "MultiHeadDotProductAttention_0",
        "query key value out",
        ("Dense_0", "Dense_1"),
        ("LayerNorm_0", "LayerNorm_1"),
    )
    native = _layer("attn", "q_proj k_proj v_proj out_proj", ("mlp/fc1", "mlp/fc2"), ("ln1", "ln2"))
    tree: dict[str, Any] = {}
    flat = []
    for i in range(math.ceil(parameters / _LAYER)):
        for path, shape in linen.items():
            *modules, name = f"EncoderBlock_{i}/{path}".split("/")
            branch = tree
            for key in modules:
                branch = branch.setdefault(key, {})
            branch[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, shape in native.items():
            variable = nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))
            flat.append((("encoder", "layers", i, *path.split("/")), variable))
    return {"params": tree}, nnx.from_flat_state(flat)


def _check(plan: Any) -> None:
    plan.check()
    for row in plan.rows:
        ((_, block, *_),), ((_, _, i, *_),) = row.linen, row.nnx
        assert block == f"EncoderBlock_{i}", row.text


def run(rounds: int = 5) -> Table:
    """The table of matching models of 100, 1,000 and 10,000 parameters."""
    table = Table("weights", "Matching parameters by path, type and shape")
    seconds = {}
    for parameters in (100, 1_000, 10_000):
        linen, native = _models(parameters)
        _check(match(linen, native))
        what = f"{parameters:,} parameters"
        _, seconds[parameters] = interleaved(
            {"match": lambda a=linen, b=native: match(a, b)},
            "match",
            rounds if parameters < 10_000 else 3,
            what,
            time.process_time,
        )
        claim = SECONDS if parameters == 10_000 else None
        ratio = Ratio.exact(seconds[parameters])
        table.add(what, "match", "one second", ratio, seconds[parameters], claim)
    for small, large in ((100, 1_000), (1_000, 10_000)):
        growth = math.log(seconds[large] / seconds[small]) / math.log(large / small)
        claim = EXPONENT if large == 10_000 else None
        what = f"{small:,} to {large:,}"
        table.add(what, "exponent of growth", "linear", Ratio.exact(growth), claim=claim)
    return table

"""Modules that the property tests draw, each from a *recipe*: a nested tuple of names of layers.

A recipe is run by a Linen module and by an NNX module. All layers keep the width of their input.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from hypothesis import strategies as st

WIDTH = 3
# A name, or a kind of nesting followed by a recipe.
Recipe = tuple[Any, ...]

LAYERS = ("dense", "again", "tanh", "norm", "dropout", "sow", "perturb", "count", "boxed", "scan")
LINEN_NESTS = ("compact", "setup", "remat", "vmap", "method")
NNX_NESTS = ("list", "dict", "sequential", "shared")


def recipes(nests: tuple[str, ...]) -> st.SearchStrategy[Recipe]:
    """Recipes of up to six layers, with up to two levels of nesting."""
    plain = st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3).map(tuple)
    nested = st.tuples(st.sampled_from(nests), plain).map(lambda n: (n[0], *n[1]))
    return st.lists(st.sampled_from(LAYERS) | nested, min_size=1, max_size=4).map(tuple)


class _Step(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        x = nn.Dense(WIDTH, dtype=self.dtype, param_dtype=self.dtype)(x)
        self.sow("intermediates", "step", x)
        return jnp.tanh(x), None


_Steps = nn.scan(
    _Step,
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True},
    length=2,
)


class Linen(nn.Module):
    """Runs a recipe in Linen."""

    recipe: Recipe
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = {"dtype": self.dtype, "param_dtype": self.dtype}
        dense = nn.Dense(WIDTH, **options, name="first")
        for i, layer in enumerate(self.recipe):
            match layer:
                case "dense":
                    x = nn.Dense(WIDTH, **options)(x)
                case "again":
                    x = dense(x)
                case "tanh":
                    x = jnp.tanh(x)
                case "norm":
                    x = nn.BatchNorm(use_running_average=False, **options)(x)
                case "dropout":
                    x = nn.Dropout(0.5, deterministic=False)(x)
                case "sow":
                    self.sow("intermediates", "x", x)
                case "perturb":
                    x = self.perturb(f"x{i}", x)
                case "count":
                    count = self.variable("state", f"count{i}", lambda: jnp.int32(0))
                    count.value += 1
                    x = x * count.value
                case "boxed":
                    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("a", None))
                    x = nn.Dense(WIDTH, **options, kernel_init=init)(x)
                case "scan":
                    x = _Steps(self.dtype)(x, None)[0]
                case (nest, *inner):
                    x = self._nested(nest, tuple(inner), x)
        return x

    def _nested(self, nest: str, recipe: Recipe, x: jax.Array) -> jax.Array:
        match nest:
            case "setup":
                return LinenSetup(recipe, self.dtype)(x)
            case "method":
                return LinenSetup(recipe, self.dtype).twice(x)
            case "remat":
                return nn.remat(Linen)(recipe, self.dtype)(x)
            case "vmap":
                axes = {name: 0 for name in COLLECTIONS}
                split = {"params": True, "dropout": True}
                mapped = nn.vmap(
                    Linen,
                    variable_axes=axes,
                    split_rngs=split,
                    axis_size=2,
                    metadata_params={nn.PARTITION_NAME: "copies"},
                )
                return mapped(recipe, self.dtype)(jnp.stack([x, 2 * x])).sum(0)
        return Linen(recipe, self.dtype)(x)


class LinenSetup(nn.Module):
    """Holds a module that is made in `setup`, and has two methods."""

    recipe: Recipe
    dtype: Any

    def setup(self) -> None:
        self.inner = Linen(self.recipe, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.inner(x)

    def twice(self, x: jax.Array) -> jax.Array:
        return self.inner(jnp.tanh(self(x)))


COLLECTIONS = ("params", "batch_stats", "state", "intermediates", "perturbations")


class Count(nnx.Variable[Any]):
    """A type of the user's own."""


class _Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.drop(self.dense(x)))


class Native(nnx.Module):
    """Runs a recipe in NNX."""

    def __init__(self, recipe: Recipe, rngs: nnx.Rngs) -> None:
        self.recipe = nnx.static(recipe)
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.layers = nnx.Dict()
        for i, layer in enumerate(recipe):
            part = self._part(layer, rngs)
            if part is not None:
                self.layers[f"l{i}"] = part

    def _part(self, layer: Any, rngs: nnx.Rngs) -> Any:
        match layer:
            case "dense":
                return nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            case "again":
                return self.first
            case "norm":
                return nnx.BatchNorm(WIDTH, rngs=rngs)
            case "dropout":
                return nnx.Dropout(0.5, rngs=rngs)
            case "count":
                return Count(jnp.int32(0))
            case "boxed":
                tied = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
                tied.kernel = self.first.kernel
                return tied
            case "scan":
                make = nnx.split_rngs(splits=2)(nnx.vmap(_Layer))
                return make(rngs)
            case ("list", *inner):
                return nnx.List([Native(tuple(inner), rngs)])
            case ("dict", *inner):
                return nnx.Dict(inner=Native(tuple(inner), rngs))
            case ("sequential", *inner):
                return nnx.Sequential(Native(tuple(inner), rngs), jnp.tanh)
            case ("shared", *inner):
                part = Native(tuple(inner), rngs)
                part.owner = self  # A cycle.
                return part
        return None

    def __call__(self, x: jax.Array) -> jax.Array:
        for i, layer in enumerate(self.recipe):
            part = self.layers.get(f"l{i}")
            match layer:
                case "tanh":
                    x = jnp.tanh(x)
                case "sow":
                    self.sow(nnx.Intermediate, "x", x)
                case "perturb":
                    x = self.perturb(f"x{i}", x)
                case "count":
                    part[...] += 1
                    x = x * part[...]
                case "scan":
                    x = _run(x, part)
                case ("list", *_):
                    x = part[0](x)
                case ("dict", *_):
                    x = part["inner"](x)
                case ("shared", *_):
                    x = part.owner.first(part(jnp.tanh(part(x))))
                case _:
                    x = part(x)
        return x


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def _run(x: jax.Array, layer: _Layer) -> jax.Array:
    return layer(x)

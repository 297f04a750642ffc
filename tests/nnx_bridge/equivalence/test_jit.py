"""Modules under a `jit` of their own are compared like others, whatever traces there are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from nnx_bridge import Host, Report, compare
from nnx_bridge.audit import inspect

X = jax.ShapeDtypeStruct((2, 4), "float32")
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


class Block(nn.Module):
    """A layer with layers in it, and a mask."""

    factor: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.factor * nn.tanh(nn.Dense(4, name="dense")(x))
        return nn.Dropout(0.5, deterministic=False, name="drop")(y)


CompiledBlock = nn.jit(Block)


class Blocks(nn.Module):
    """Two blocks whose fields and shapes are equal."""

    block: type[nn.Module]
    factor: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for name in "ab":
            x = self.block(self.factor, name=name)(x)
        return x


class NativeBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, factor: float) -> None:
        self.dense, self.drop = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.factor = factor

    @nnx.jit
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.factor * jnp.tanh(self.dense(x)))


class Native(nnx.Module):
    def __init__(self, factor: float = 1.0) -> None:
        rngs = nnx.Rngs(0)
        self.a, self.b = NativeBlock(rngs, factor), NativeBlock(rngs, factor)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.b(self.a(x))


def check(reference: Any, model: Any) -> Report:
    return compare(reference, model, X, seeds=1, steps=1)


def trace(model: nn.Module) -> Any:
    """Leaves traces of a model, such as a comparison would ask for."""
    variables = model.init(KEYS, jnp.ones((2, 4)))

    def call(variables: Any, x: Any, rngs: Any) -> Any:
        return model.apply(variables, x, rngs=rngs, mutable=[])

    jax.jit(call)(variables, jnp.ones((2, 4)), KEYS)
    return variables


ALL = {"", "a", "a/dense", "a/drop", "b", "b/dense", "b/drop"}


@pytest.mark.parametrize("how", ["compiled", "hosted", "native"])
def test_compiled_modules_are_seen_and_draw_as_others_do(how: str) -> None:
    variables = trace(Blocks(CompiledBlock))
    model: Any = {
        "compiled": lambda: Blocks(CompiledBlock),
        "hosted": lambda: Host(Blocks(CompiledBlock), variables),
        "native": Native,
    }[how]()
    for _ in range(2):
        # What the first comparison has traced is no trace for the second.
        report = check(Blocks(Block), model)
        report.assert_equal()
        paths = {row.path.partition(" [")[0] for row in report.rows if row.what == "layer output"}
        assert paths == ALL


@pytest.mark.parametrize("model", [Blocks(CompiledBlock, 1.1), Native(1.1)], ids=["Linen", "NNX"])
def test_a_fault_in_a_compiled_module_is_named(model: Any) -> None:
    report = check(Blocks(CompiledBlock), model)
    assert report.parting is not None
    assert report.parting.path == "a"


def test_an_audit_sees_modules_of_which_there_are_traces() -> None:
    x = jnp.ones((2, 4))
    for _ in range(2):
        layers = [f.where for f in inspect(Blocks(CompiledBlock), x).findings if f.kind == "layer"]
        assert layers == ["a/dense", "a/drop", "b/dense", "b/drop"]

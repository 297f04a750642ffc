"""Linen models of the tests of hosts, each with one thing that is not plain."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from tests.helpers import normal

X = normal(2, 4)
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


class Encoder(nn.Module):
    """Is given an embedding that belongs to its parent."""

    embed: nn.Module
    width: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dropout(0.5)(self.embed(x), deterministic=not train)
        return nn.Dense(self.width)(x)


class Net(nn.Module):
    """`setup`, a list of modules, a shared module, dropout, statistics, and a second method."""

    def setup(self) -> None:
        self.embed = nn.Dense(4)
        self.encoder = Encoder(self.embed)
        self.layers = [nn.Dense(4) for _ in range(2)]
        self.named = {"a": nn.Dense(4)}
        self.norm = nn.BatchNorm()

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = self.encode(x, train)
        for layer in self.layers:
            x = layer(x)
        return self.norm(self.named["a"](x), use_running_average=not train)

    def encode(self, x: jax.Array, train: bool = False) -> jax.Array:
        return self.encoder(x, train)


class Layer(nn.Module):
    """A layer that `nn.scan` repeats: it writes and draws."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
        return nn.Dropout(0.5, deterministic=False)(x), None


class Scanned(nn.Module):
    """A stack of layers under `nn.scan` and `nn.remat`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stack = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        return stack(name="layers")(x, None)[0]


class Names(nn.Module):
    """Submodules that are called like attributes of NNX modules and of hosts."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for name in ("train", "eval", "rngs", "module", "split", "sow", "_linen", "_linen_rngs"):
            x = nn.Dense(4, name=name)(x)
        return x


class Block(nnx.Module):
    """A native block with statistics and dropout."""

    def __init__(self, rngs: nnx.Rngs, width: int = 4) -> None:
        self.dense = nnx.Linear(4, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array, *_: Any) -> jax.Array:
        return self.drop(self.norm(self.dense(x)))


class Carries(Block):
    """A native block for `nn.scan`."""

    def __call__(self, x: jax.Array, *_: Any) -> Any:
        return super().__call__(x), None


class Around(nnx.Module):
    """Holds what it stands for, and scales its output."""

    def __init__(self, inner: nnx.Module) -> None:
        self.inner = inner
        self.scale = nnx.Param(jnp.float32(1.0))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return jax.tree.map(lambda y: y * self.scale, self.inner(*args, **kwargs))

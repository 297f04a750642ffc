"""NNX modules that the tests share, each small and each with one thing that is not plain."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.helpers import normal_like


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = 3, out: int = 2) -> None:
        self.first = nnx.Linear(3, width, rngs=rngs)
        self.second = nnx.Linear(width, out, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jnp.tanh(self.first(x)))


class Norm(nnx.Module):
    """Writes its statistics in each call."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.out = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jnp.tanh(self.norm(self.dense(x))))


class Noisy(nnx.Module):
    """Draws from an RNG stream."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(self.drop(x))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.down = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Encoder(nnx.Module):
    """A small transformer encoder."""

    def __init__(self, rngs: nnx.Rngs, layers: int = 2) -> None:
        self.embed = nnx.Linear(3, 4, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


class Count(nnx.Variable[Any]):
    """A type of the user's own."""


class Counter(nnx.Module):
    """Holds what cannot be differentiated, and writes it: an integer, a boolean, keys."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 2, rngs=rngs)
        self.count = Count(jnp.int32(0))
        self.flag = Count(jnp.array(True))
        self.key = Count(jax.random.key(5))
        self.raw_key = Count(jax.random.PRNGKey(5))
        self.mean = Count(jnp.float32(0.5))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.count[...] += 1
        self.flag[...] = ~self.flag[...]
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean()
        return self.dense(x) * self.mean[...] + self.count[...]


class Shared(nnx.Module):
    """One submodule under two names, and one Variable in two submodules."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.again = self.first
        self.tied = nnx.Linear(3, 3, rngs=rngs)
        self.tied.kernel = self.first.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.tied(self.again(jnp.tanh(self.first(x))))


class Cyclic(nnx.Module):
    """Children that know their parent."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.child = nnx.Linear(3, 3, rngs=rngs)
        self.child.parent = self
        self.scale = nnx.Param(jnp.float32(1.5))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.child(x) * self.child.parent.scale[...]


class Containers(nnx.Module):
    """Submodules in every container of NNX, and a bare array."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.items = nnx.List([nnx.Linear(3, 3, rngs=rngs), jnp.tanh])
        self.named = nnx.Dict(a=nnx.Linear(3, 3, rngs=rngs), b=nnx.Param(jnp.ones(3)))
        self.chain = nnx.Sequential(nnx.BatchNorm(3, rngs=rngs), nnx.relu)
        self.offset = nnx.data(jnp.ones(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.items[1](self.items[0](x))
        return self.chain(self.named["a"](x) * self.named["b"]) + self.offset


class Stacked(nnx.Module):
    """Layers made by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs: nnx.Rngs) -> nnx.Module:
            return Layer(rngs)

        self.layers = make(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: jax.Array, layer: Layer) -> jax.Array:
            return layer(x)

        return run(x, self.layers)


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.norm(jnp.tanh(self.dense(x))))


MODELS: dict[str, type[nnx.Module]] = {
    "mlp": MLP,
    "encoder": Encoder,
    "norm": Norm,
    "noisy": Noisy,
    "counter": Counter,
    "shared": Shared,
    "cyclic": Cyclic,
    "containers": Containers,
    "stacked": Stacked,
}


def make(kind: type[Any], seed: int = 0) -> Any:
    """A module of which no Variable is zero; equal for equal seeds."""
    mdl = kind(nnx.Rngs(seed))
    params = nnx.state(mdl, nnx.Param)
    noise = normal_like(params, seed + 3)
    nnx.update(mdl, jax.tree.map(lambda x, n: x + 0.1 * n, params, noise))
    return mdl

"""Linen models that the tests of the audit look at; one use of Linen a line."""

from __future__ import annotations

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import partitioning as nn_partitioning
from flax.linen.linear import Dense

remat = nn_partitioning.remat


class Block(nn.Module):
    dtype: Any = jnp.float32
    norm: nn.Module | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.LayerNorm(dtype=self.dtype)(x)
        x = nn.LayerNorm(dtype=jnp.bfloat16)(x)
        x = nn.LayerNorm(epsilon=1e-5)(x)
        x = nn.relu(Dense(4)(x))
        self.sow("intermediates", "hidden", x)
        x = self.perturb("point", x)
        return nn.Dropout(0.5, deterministic=not train, rng_collection="drop")(x)


class Recurrent(nn.RNNCellBase):
    features: int

    @nn.compact
    def __call__(self, carry: Any, x: jax.Array) -> Any:
        return flax.linen.GRUCell(self.features)(carry, x)


class Noise(nn.Module):
    def setup(self) -> None:
        self.scale = self.param("scale", nn.initializers.ones, (1,))
        self.count = self.variable("counts", "calls", lambda: jnp.zeros(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.is_initializing():
            self.count.value += 1
        return x + self.scale * jax.random.normal(self.make_rng("noise"), x.shape)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = remat(Block, static_argnums=(1,))()(x, train)
        x = Noise()(x)
        carry = jnp.zeros((*x.shape[:-1], 4))
        carry, x = Recurrent(4)(carry, x)
        x = nn.WeightNorm(nn.Dense(3))(x)
        return nn.MultiHeadAttention(1)(x[None])[0]


class Hooked(Block):
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        with nn.intercept_methods(
            lambda next_fun, args, kwargs, context: next_fun(*args, **kwargs)
        ):
            return super().__call__(x, train)


def small() -> Any:
    return Model(), jnp.ones((2, 4)), {"train": True}

"""One transformer encoder, written in Linen, in NNX and in Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

LAYERS, WIDTH, HEADS, HIDDEN, TOKENS = 12, 64, 4, 128, 16


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(HIDDEN)(nn.LayerNorm()(x))))


class LinenEncoder(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(LAYERS):
            x = LinenBlock()(x)
        return nn.LayerNorm()(x)


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, rngs=rngs, decode=False)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.dense1 = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.dense2 = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.dense2(nnx.gelu(self.dense1(self.norm2(x))))


class NNXEncoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class EquinoxBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    dense1: eqx.nn.Linear
    dense2: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 3)
        self.norm1 = eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(
            HEADS,
            WIDTH,
            use_query_bias=True,
            use_key_bias=True,
            use_value_bias=True,
            use_output_bias=True,
            key=keys[0],
        )
        self.norm2 = eqx.nn.LayerNorm(WIDTH)
        self.dense1 = eqx.nn.Linear(WIDTH, HIDDEN, key=keys[1])
        self.dense2 = eqx.nn.Linear(HIDDEN, WIDTH, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        normed = jax.vmap(self.norm1)(x)
        x = x + self.attention(normed, normed, normed)
        hidden = jax.nn.gelu(jax.vmap(self.dense1)(jax.vmap(self.norm2)(x)))
        return x + jax.vmap(self.dense2)(hidden)


class EquinoxEncoder(eqx.Module):
    blocks: list[EquinoxBlock]
    norm: eqx.nn.LayerNorm

    def __init__(self, key: jax.Array) -> None:
        self.blocks = [EquinoxBlock(k) for k in jax.random.split(key, LAYERS)]
        self.norm = eqx.nn.LayerNorm(WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.norm)(x)


def sample() -> jax.Array:
    """A sequence of token vectors, shape ``(TOKENS, WIDTH)``."""
    return jnp.linspace(-1.0, 1.0, TOKENS * WIDTH).reshape(TOKENS, WIDTH)

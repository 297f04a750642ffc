"""Linen modules that the tests share, each small and each with one thing that is not plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class MLP(nn.Module):
    width: int = 3
    out: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(nn.Dense(self.width)(x))
        return nn.Dense(self.out)(x)


class Norm(nn.Module):
    """Writes its statistics in each call."""

    train: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(3)(x)
        x = nn.BatchNorm(use_running_average=not self.train)(x)
        return nn.Dense(2)(jnp.tanh(x))


class Noisy(nn.Module):
    """Draws from an RNG stream."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=False)(x))


class Sower(nn.Module):
    """Sows an intermediate that depends on its input and parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(3)(x)
        self.sow("intermediates", "hidden", x)
        return nn.Dense(2)(jnp.sin(x))


class Counter(nn.Module):
    """Holds what cannot be differentiated: an integer, a boolean, keys of both kinds."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        count = self.variable("state", "count", lambda: jnp.int32(0))
        self.variable("state", "flag", lambda: jnp.array(True))
        self.variable("state", "key", lambda: jax.random.key(5))
        self.variable("state", "raw_key", lambda: jax.random.PRNGKey(5))
        mean = self.variable("state", "mean", lambda: jnp.float32(0.5))
        if self.is_mutable_collection("state") and not self.is_initializing():
            count.value += 1
            mean.value = 0.9 * mean.value + 0.1 * x.mean()
        return nn.Dense(2)(x) * mean.value + count.value


class Boxed(nn.Module):
    """Parameters in boxes; ``box`` wraps an initializer."""

    box: Callable[..., Any] = nn.with_partitioning

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = self.box(nn.initializers.lecun_normal(), ("in", "out"))
        return nn.Dense(2, kernel_init=init)(x)


class Methods(nn.Module):
    """Made in `setup`, with several methods."""

    def setup(self) -> None:
        self.encoder = nn.Dense(3)
        self.decoder = nn.Dense(2)

    def encode(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.encoder(x))

    def loss(self, x: jax.Array) -> jax.Array:
        return jnp.sum(self(x) ** 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decoder(self.encode(x))


class Shared(nn.Module):
    """Calls one submodule twice."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.Dense(x.shape[-1])
        return dense(jnp.tanh(dense(x)))


class Holder(nn.Module):
    """Was given modules that belong to someone else."""

    first: nn.Module
    others: tuple[nn.Module, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Dense(2)(x) + self.first(x)
        return y + sum(other(x) for other in self.others)


class EncoderLayer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)(y, y)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(4)(nn.gelu(nn.Dense(8)(y)))


class Encoder(nn.Module):
    layers: int = 12

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(4)(x)
        for _ in range(self.layers):
            x = EncoderLayer()(x)
        return nn.LayerNorm()(x)


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return jnp.tanh(nn.Dense(x.shape[-1])(x)), None


class Scanned(nn.Module):
    """Layers in one `nn.scan`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nn.scan(_Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan()(x, None)[0]

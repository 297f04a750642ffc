"""Linen models and their rewrites in NNX, right ones, and each with one fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


class Mlp(nn.Module):
    """Statistics, dropout, a residual: what a small model has."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(8, dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(x)
        h = nn.Dropout(0.5, deterministic=not train)(nn.gelu(x))
        h = nn.Dense(8, dtype=self.dtype, name="mix")(h)
        x = nn.LayerNorm(dtype=self.dtype)(x + h)
        return nn.Dense(3, dtype=self.dtype)(x)


class MlpRewrite(nnx.Module):
    """The same in NNX; its arguments are what can be wrong with it."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        dtype: Any = None,
        epsilon: float = 1e-6,
        momentum: float = 0.9,
        rate: float = 0.5,
        residual: bool = True,
        activation: Callable[[jax.Array], jax.Array] = nnx.gelu,
        mix: type[nnx.Linear] = nnx.Linear,
        mix_dtype: Any = None,
        scale: bool = True,
        norm: type[nnx.BatchNorm] = nnx.BatchNorm,
    ) -> None:
        self.Dense_0 = nnx.Linear(4, 8, dtype=dtype, rngs=rngs)
        self.BatchNorm_0 = norm(8, momentum=momentum, dtype=dtype, rngs=rngs)
        self.Dropout_0 = nnx.Dropout(rate, rngs=rngs)
        self.mix = mix(8, 8, dtype=mix_dtype or dtype, rngs=rngs)
        self.LayerNorm_0 = nnx.LayerNorm(
            8, epsilon=epsilon, use_scale=scale, dtype=dtype, rngs=rngs
        )
        self.Dense_1 = nnx.Linear(8, 3, dtype=dtype, rngs=rngs)
        self.residual, self.activation = residual, activation

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.BatchNorm_0(self.Dense_0(x))
        h = self.mix(self.Dropout_0(self.activation(x)))
        return self.Dense_1(self.LayerNorm_0(x + h if self.residual else h))


class NegativeBias(nnx.Linear):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...] - self.bias[...]


class Transposed(nnx.Linear):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...].T + self.bias[...]


class Stopped(nnx.Linear):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ jax.lax.stop_gradient(self.kernel[...]) + self.bias[...]


class Halved(nnx.Linear):
    """Right forward, and half the gradient backward."""

    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x)
        return y / 2 + jax.lax.stop_gradient(y / 2)


class WritesBack(nnx.Linear):
    """As normalising layers of some versions of Flax: a call changes the kernel."""

    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x)
        self.kernel[...] = self.kernel[...] * 0.5
        return y


class Frozen(nnx.BatchNorm):
    """Normalises with the batch, and forgets to keep its statistics."""

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        mean, var = self.mean[...], self.var[...]
        y = super().__call__(x, *args, **kwargs)
        self.mean[...], self.var[...] = mean, var
        return y


class Images(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(4, (3, 3), strides=2, padding="SAME")(x)
        x = nn.LayerNorm()(x)
        return nn.Conv(4, (1, 1))(x)


class ImagesRewrite(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, conv: Any = None, norm: Any = None) -> None:
        options = {"strides": 2, "padding": "SAME", **(conv or {})}
        self.Conv_0 = nnx.Conv(3, 4, (3, 3), rngs=rngs, **options)
        self.LayerNorm_0 = nnx.LayerNorm(4, rngs=rngs, **(norm or {}))
        self.Conv_1 = nnx.Conv(4, 4, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.Conv_1(self.LayerNorm_0(self.Conv_0(x)))


class Text(nn.Module):
    """Tokens, a causal mask, attention; and layers in a list."""

    dtype: Any = None

    def setup(self) -> None:
        self.embed = nn.Embed(11, 8, dtype=self.dtype)
        self.attention = nn.MultiHeadDotProductAttention(2, dtype=self.dtype)
        self.layers = [nn.Dense(8, dtype=self.dtype) for _ in range(2)]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        x = x + self.attention(x, mask=nn.make_causal_mask(tokens))
        for layer in self.layers:
            x = nn.relu(layer(x))
        return self.embed.attend(x)


def _unscaled(query: jax.Array, key: jax.Array, value: jax.Array, **kwargs: Any) -> jax.Array:
    size = query.shape[-1] ** 0.5
    return nnx.dot_product_attention(query * size, key, value, mask=kwargs["mask"])


class TextRewrite(nnx.Module):
    def __init__(
        self, rngs: nnx.Rngs, *, shift: int = 0, scaled: bool = True, swap: bool = False,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        function = {} if scaled else {"attention_fn": _unscaled}
        self.embed = nnx.Embed(11, 8, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 8, decode=False, dtype=dtype, rngs=rngs, **function
        )
        self.layers = nnx.List([nnx.Linear(8, 8, dtype=dtype, rngs=rngs) for _ in range(2)])
        self.shift, self.swap = shift, swap

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        length = tokens.shape[-1]
        mask = jnp.tril(jnp.ones((1, 1, length, length)), self.shift)
        x = x + self.attention(x, mask=mask)
        for layer in reversed(self.layers) if self.swap else self.layers:
            x = nnx.relu(layer(x))
        return self.embed.attend(x)


class Sequence(nn.Module):
    def setup(self) -> None:
        self.rnn = nn.RNN(nn.SimpleCell(5))
        self.dense = nn.Dense(2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(self.rnn(x))


class SequenceRewrite(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, carry: float = 0.0) -> None:
        self.rnn = Loop(rngs)
        self.dense = nnx.Linear(5, 2, rngs=rngs)
        self.carry = carry

    def __call__(self, x: jax.Array) -> jax.Array:
        carry = jnp.full((x.shape[0], 5), self.carry)
        return self.dense(self.rnn(x, carry))


class Cell(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.i = nnx.Linear(3, 5, rngs=rngs)
        self.h = nnx.Linear(5, 5, use_bias=False, rngs=rngs)

    def __call__(self, carry: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.i(x) + self.h(carry))


class Loop(nnx.Module):
    """A recurrent network as one writes it by hand, over time in Python."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.cell = Cell(rngs)

    def __call__(self, x: jax.Array, carry: jax.Array) -> jax.Array:
        outputs = []
        for step in range(x.shape[1]):
            carry = self.cell(carry, x[:, step])
            outputs.append(carry)
        return jnp.stack(outputs, 1)


class Memory(nn.Module):
    """Each call reads what the last one left."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        memory = self.variable("memory", "last", jnp.zeros, (3,))
        before = memory.value
        if not self.is_initializing():
            memory.value = before + x.mean(0)
        return nn.Dense(3)(x + before)


class Last(nnx.Variable[Any]):
    """What a call leaves for the next."""


class MemoryRewrite(nnx.Module):
    """Replaces what it should add up, which is the same the first time."""

    def __init__(self, rngs: nnx.Rngs, *, adds: bool = True) -> None:
        self.last, self.adds = Last(jnp.zeros(3)), adds
        self.Dense_0 = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        before = self.last[...]
        self.last[...] = x.mean(0) + (before if self.adds else 0)
        return self.Dense_0(x + before)


nnx.register_variable_name("memory", Last)

"""Linen's recurrent cells of dense layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Unpack

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.linen.dtypes import promote_dtype

from nnx_bridge.compat._cell import (
    Array,
    DenseCell,
    GatedFields,
    MGUFields,
    Pair,
    SimpleFields,
)


class LSTMCell(DenseCell):
    """`flax.linen.LSTMCell`; `nnx.LSTMCell` with Linen's names, where the gate `if` is `if`.

    Args:
      in_features: Size of the last axis of the inputs.
      hidden_features: Size of the carry, which Linen calls `features`.
      rngs: The stream `params` gives the parameters.
      **fields: The other fields of `flax.linen.LSTMCell`, with its defaults.

    Example:
        >>> cell = LSTMCell(3, 4, rngs=nnx.Rngs(0))
        >>> carry = cell.initialize_carry((2, 3))
        >>> carry, y = cell(carry, jnp.ones((2, 3)))
        >>> y.shape, getattr(cell, "if").kernel.shape
        ((2, 4), (3, 4))
    """

    carries = 2
    _linen: ClassVar[type[nn.RNNCellBase]] = nn.LSTMCell

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        rngs: nnx.Rngs,
        **fields: Unpack[GatedFields],
    ) -> None:
        gates = {"ii": False, "if": False, "ig": False, "io": False}
        gates |= {"hi": True, "hf": True, "hg": True, "ho": True}
        super().__init__(self._linen, in_features, hidden_features, gates, rngs, fields)

    def __call__(self, carry: Pair, inputs: Array) -> tuple[Pair, Array]:
        c, h = carry
        sums = (self._layer(f"i{k}", inputs) + self._layer(f"h{k}", h) for k in "ifgo")
        return self._step(c, sums)

    def _step(self, c: Array, sums: Iterable[Array]) -> tuple[Pair, Array]:
        functions = self.gate_fn, self.gate_fn, self.activation_fn, self.gate_fn
        i, f, g, o = (fn(x) for fn, x in zip(functions, sums, strict=True))
        new_c = f * c + i * g
        new_h = o * self.activation_fn(new_c)
        return (new_c, new_h), new_h


class OptimizedLSTMCell(LSTMCell):
    """`flax.linen.OptimizedLSTMCell`: an LSTM in two products, its gates initialised one by one.

    Args:
      in_features: Size of the last axis of the inputs.
      hidden_features: Size of the carry, which Linen calls `features`.
      rngs: The stream `params` gives the parameters.
      **fields: The other fields of `flax.linen.OptimizedLSTMCell`, with its defaults.

    Example:
        >>> cell = OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0))
        >>> kernel = cell.hf.kernel[...]
        >>> bool(jnp.allclose(kernel @ kernel.T, jnp.eye(4), atol=1e-5))
        True
    """

    _linen = nn.OptimizedLSTMCell

    def __call__(self, carry: Pair, inputs: Array) -> tuple[Pair, Array]:
        c, h = carry
        from_h, from_inputs = self._gates("h", h), self._gates("i", inputs)
        return self._step(c, (a + b for a, b in zip(from_h, from_inputs, strict=True)))

    def _gates(self, side: str, x: Array) -> list[Array]:
        layers = [getattr(self, f"{side}{gate}") for gate in "ifgo"]
        kernel = jnp.concatenate([layer.kernel[...] for layer in layers], axis=-1)
        bias = None
        if layers[0].use_bias:
            bias = jnp.concatenate([layer.bias[...] for layer in layers], axis=-1)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.dot(x, kernel)
        if bias is not None:
            y += jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))
        return jnp.split(y, 4, axis=-1)


class GRUCell(DenseCell):
    """`flax.linen.GRUCell`: with the bias of `hn`, which `nnx.GRUCell` does not have.

    Args:
      in_features: Size of the last axis of the inputs.
      hidden_features: Size of the carry, which Linen calls `features`.
      rngs: The stream `params` gives the parameters.
      **fields: The other fields of `flax.linen.GRUCell`, with its defaults.

    Example:
        >>> cell = GRUCell(3, 4, rngs=nnx.Rngs(0))
        >>> h, y = cell(cell.initialize_carry((2, 3)), jnp.ones((2, 3)))
        >>> y.shape, cell.hn.bias.shape
        ((2, 4), (4,))
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        rngs: nnx.Rngs,
        **fields: Unpack[GatedFields],
    ) -> None:
        layers = {"ir": True, "iz": True, "in": True, "hr": False, "hz": False, "hn": True}
        super().__init__(nn.GRUCell, in_features, hidden_features, layers, rngs, fields)

    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        h = carry
        r = self.gate_fn(self._layer("ir", inputs) + self._layer("hr", h))
        z = self.gate_fn(self._layer("iz", inputs) + self._layer("hz", h))
        n = self.activation_fn(self._layer("in", inputs) + r * self._layer("hn", h))
        new_h = (1.0 - z) * n + z * h
        return new_h, new_h


class MGUCell(DenseCell):
    """`flax.linen.MGUCell`, the minimal gated unit (Zhou et al., 2016, arXiv:1603.09420).

    Args:
      in_features: Size of the last axis of the inputs.
      hidden_features: Size of the carry, which Linen calls `features`.
      rngs: The stream `params` gives the parameters.
      **fields: The other fields of `flax.linen.MGUCell`, with its defaults.

    Example:
        >>> cell = MGUCell(3, 4, reset_gate=False, rngs=nnx.Rngs(0))
        >>> nnx.RNN(cell)(jnp.ones((2, 5, 3))).shape
        (2, 5, 4)
    """

    reset_gate: bool

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        rngs: nnx.Rngs,
        **fields: Unpack[MGUFields],
    ) -> None:
        layers = {"if": True, "in": True, "hf": False, "hn": fields.get("reset_gate", True)}
        super().__init__(nn.MGUCell, in_features, hidden_features, layers, rngs, fields)

    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        h = carry
        f = self.gate_fn(self._layer("if", inputs) + self._layer("hf", h))
        x = self._layer("hn", h)
        if self.reset_gate:
            x *= f
        n = self.activation_fn(self._layer("in", inputs) + x)
        new_h = (1.0 - f) * n + f * h
        return new_h, new_h


class SimpleCell(DenseCell):
    """`flax.linen.SimpleCell`: its dtype is that of the inputs and the parameters by default.

    Args:
      in_features: Size of the last axis of the inputs.
      hidden_features: Size of the carry, which Linen calls `features`.
      rngs: The stream `params` gives the parameters.
      **fields: The other fields of `flax.linen.SimpleCell`, with its defaults.

    Example:
        >>> cell = SimpleCell(3, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        >>> h, y = cell(cell.initialize_carry((2, 3)), jnp.ones((2, 3), jnp.bfloat16))
        >>> y.dtype.name
        'bfloat16'
    """

    residual: bool

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        rngs: nnx.Rngs,
        **fields: Unpack[SimpleFields],
    ) -> None:
        layers = {"i": True, "h": False}
        super().__init__(nn.SimpleCell, in_features, hidden_features, layers, rngs, fields)

    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        new_carry = self._layer("i", inputs) + self._layer("h", carry)
        if self.residual:
            new_carry += carry
        new_carry = self.activation_fn(new_carry)
        return new_carry, new_carry

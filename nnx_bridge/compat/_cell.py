"""What Linen's recurrent cells share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, TypedDict

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.typing import Dtype, Initializer

from nnx_bridge.compat._layer import set_fields, set_variables, shaped, unset

Array: TypeAlias = jax.Array
Pair: TypeAlias = tuple[Array, Array]
Rngs: TypeAlias = nnx.Rngs | nnx.RngStream | Array


class _Fields(TypedDict, total=False):
    activation_fn: Callable[[Any], Any]
    kernel_init: Initializer
    recurrent_kernel_init: Initializer
    dtype: Dtype | None
    param_dtype: Dtype
    carry_init: Initializer


class BiasFields(_Fields, total=False):
    bias_init: Initializer


class GatedFields(BiasFields, total=False):
    """Settings of LSTMCell, OptimizedLSTMCell and GRUCell."""

    gate_fn: Callable[[Any], Any]


class SimpleFields(BiasFields, total=False):
    """Settings of SimpleCell."""

    residual: bool


class MGUFields(_Fields, total=False):
    """Settings of MGUCell."""

    gate_fn: Callable[[Any], Any]
    forget_bias_init: Initializer
    activation_bias_init: Initializer
    reset_gate: bool


class Cell(nnx.RNNCellBase):
    """A cell whose carry is one array, or a pair of them."""

    carries: ClassVar[int] = 1

    hidden_features: int
    dtype: Dtype | None
    param_dtype: Dtype
    carry_init: Initializer
    gate_fn: Callable[[Any], Any]
    activation_fn: Callable[[Any], Any]

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: Rngs | None = None,
        carry_init: Initializer | None = None,
    ) -> Any:
        """The carry before the first step.

        Args:
          input_shape: The shape of the inputs of one step.
          rngs: A key, or the stream `carry`; by default `jax.random.key(0)`, as Linen's RNN has it.
          carry_init: Another initialiser than that of the cell.
        """
        stream: Any = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
        key = stream() if isinstance(stream, nnx.RngStream) else stream
        if key is None:
            key = jax.random.key(0)
        shape = (*input_shape[:-1], self.hidden_features)
        init = carry_init or self.carry_init
        if self.carries == 1:
            return init(key, shape, self.param_dtype)
        return tuple(init(k, shape, self.param_dtype) for k in jax.random.split(key))

    @property
    def num_feature_axes(self) -> int:
        return 1

    def _layer(self, name: str, x: Array) -> Array:
        return getattr(self, name)(x)


class DenseCell(Cell):
    """A cell of dense layers; the name of each tells whether the input or the carry goes in."""

    def __init__(
        self,
        linen: Callable[..., nn.RNNCellBase],
        in_features: int,
        hidden_features: int,
        layers: Mapping[str, bool],
        rngs: nnx.Rngs,
        fields: Mapping[str, Any],
    ) -> None:
        twin = linen(hidden_features, **{"recurrent_kernel_init": _orthogonal, **fields})
        self.in_features = in_features
        self.hidden_features = hidden_features
        set_fields(self, twin)
        for name, use_bias in layers.items():
            size = in_features if name.startswith("i") else hidden_features
            dense = nnx.Linear(
                size,
                hidden_features,
                use_bias=use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                **unset(),
            )
            setattr(self, name, dense)
        carry = shaped(1, hidden_features)
        carries = carry if self.carries == 1 else (carry,) * self.carries
        set_variables(self, twin, rngs, carries, shaped(1, in_features))


def _orthogonal(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Linen's initialiser, which cannot draw numbers of half precision, drawing them in float32."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return nn.initializers.orthogonal()(key, shape, wide).astype(dtype)

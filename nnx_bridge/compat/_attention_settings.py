"""The settings of Linen's attention, and what of them takes another form in NNX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias, TypedDict

import jax
from flax import nnx
from flax.typing import DotGeneralT, Dtype, Initializer, PrecisionLike

from nnx_bridge._variable_types import variable_type

Array: TypeAlias = jax.Array

# The settings that are products with the signature of `jax.lax.dot_general`.
PRODUCTS = ("qkv_dot_general", "out_dot_general")


class AttentionFields(TypedDict, total=False):
    """Settings of MultiHeadDotProductAttention."""

    dtype: Dtype | None
    param_dtype: Dtype
    qkv_features: int | None
    out_features: int | None
    broadcast_dropout: bool
    dropout_rate: float
    deterministic: bool | None
    precision: PrecisionLike
    kernel_init: Initializer
    out_kernel_init: Initializer | None
    bias_init: Initializer
    out_bias_init: Initializer | None
    use_bias: bool
    attention_fn: Callable[..., Array]
    decode: bool
    normalize_qk: bool
    force_fp32_for_softmax: bool
    qkv_dot_general: DotGeneralT | None
    out_dot_general: DotGeneralT | None
    qk_attn_weights_einsum_cls: Callable[..., Callable[..., Array]] | None
    attn_weights_value_einsum_cls: Callable[..., Callable[..., Array]] | None


class Recorder:
    """What Linen's attention functions expect of a module: somewhere to sow."""

    def __init__(self, layer: nnx.Module) -> None:
        self._layer = layer

    def sow(self, collection: str, name: str, value: Array) -> None:
        self._layer.sow(variable_type(collection), name, value)


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product with the signature of `lax.dot_general` before there was `out_sharding`."""

    product: Callable[..., Array]

    def __call__(self, *args: Any, out_sharding: Any = None, **kwargs: Any) -> Array:
        return self.product(*args, **kwargs)


def product_of(product: Any) -> Any:
    """A product as `nnx.LinearGeneral` calls it; modules of NNX take the newer arguments."""
    return product if product is None or isinstance(product, nnx.Module) else _Product(product)


def made(cls: Callable[..., Any] | None) -> Any:
    """The product that a class of them makes, None without a class."""
    return None if cls is None else cls()

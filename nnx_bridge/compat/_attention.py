"""Linen's attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias, Unpack

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.typing import Dtype, PrecisionLike
from jax import lax

from nnx_bridge.compat._attention_settings import (
    PRODUCTS,
    AttentionFields,
    Recorder,
    made,
    product_of,
)
from nnx_bridge.compat._layer import set_fields, set_variables, shaped, unset
from nnx_bridge.compat._normalization import LayerNorm

Array: TypeAlias = jax.Array
Key: TypeAlias = Array | nnx.Rngs | nnx.RngStream


class MultiHeadDotProductAttention(nnx.Module):
    """`flax.linen.MultiHeadDotProductAttention`: Linen's own products and softmax, to the bit.

    Args:
      num_heads: Number of heads.
      in_features: Size of the last axis of the queries, and of keys and values.
      in_kv_features: That of keys and values, where it is another one.
      rngs: The stream `params` gives the parameters; where there is dropout, a stream of the same
        seed as `dropout` is kept for calls that bring none.
      **fields: The other fields of `flax.linen.MultiHeadDotProductAttention`, with its defaults,
        except `qkv_dot_general_cls` and `out_dot_general_cls`: a product with a state of its own is
        given as `qkv_dot_general` or `out_dot_general`.

    Example:
        >>> attention = MultiHeadDotProductAttention(2, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        >>> attention(jnp.ones((1, 5, 8)), jnp.ones((1, 7, 8))).shape
        (1, 5, 8)
    """

    num_heads: int
    dtype: Dtype | None
    param_dtype: Dtype
    qkv_features: int
    out_features: int
    broadcast_dropout: bool
    dropout_rate: float
    deterministic: bool | None
    precision: PrecisionLike
    use_bias: bool
    attention_fn: Callable[..., Array]
    decode: bool
    normalize_qk: bool
    force_fp32_for_softmax: bool
    qk_attn_weights_einsum_cls: Callable[..., Callable[..., Array]] | None
    attn_weights_value_einsum_cls: Callable[..., Callable[..., Array]] | None

    query: nnx.LinearGeneral
    key: nnx.LinearGeneral
    value: nnx.LinearGeneral
    query_ln: LayerNorm
    key_ln: LayerNorm
    cached_key: nnx.Cache[Array]
    cached_value: nnx.Cache[Array]
    cache_index: nnx.Cache[Array]

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        in_kv_features: int | None = None,
        rngs: nnx.Rngs,
        **fields: Unpack[AttentionFields],
    ) -> None:
        products = {name: product_of(fields.get(name)) for name in PRODUCTS}
        # The products make no parameters of the twin, and NNX modules are no fields of Linen's.
        others: Any = {name: x for name, x in fields.items() if name not in products}
        twin = nn.MultiHeadDotProductAttention(num_heads, **others)
        set_fields(self, twin)
        self.in_features = in_features
        self.in_kv_features = in_kv_features or in_features
        self.qkv_features = twin.qkv_features or in_features
        self.out_features = twin.out_features or in_features
        if self.qkv_features % num_heads:
            raise ValueError(
                f"num_heads: {num_heads} heads cannot share {self.qkv_features} qkv_features evenly"
            )
        heads = (num_heads, self.qkv_features // num_heads)
        common: Any = {
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }
        sizes = (("query", in_features), ("key", self.in_kv_features))
        for name, size in (*sizes, ("value", self.in_kv_features)):
            product = {"dot_general": products["qkv_dot_general"]}
            setattr(self, name, nnx.LinearGeneral(size, heads, **common, **product, **unset()))
        product = {"dot_general": products["out_dot_general"]}
        self.out = nnx.LinearGeneral(
            heads, self.out_features, axis=(-2, -1), **common, **product, **unset()
        )
        if self.normalize_qk:
            for name in ("query_ln", "key_ln"):
                norm = LayerNorm(
                    heads[1],
                    use_bias=False,
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                    rngs=nnx.Rngs(0),
                )
                setattr(self, name, norm)
        queries, keys = shaped(1, 1, in_features), shaped(1, 1, self.in_kv_features)
        set_variables(self, twin.clone(decode=False, deterministic=True), rngs, queries, keys, keys)
        if self.dropout_rate > 0:
            self.rngs = rngs.dropout.fork()

    def __call__(
        self,
        inputs_q: Array,
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        inputs_kv: Array | None = None,
        mask: Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: Key | None = None,
        sow_weights: bool = False,
    ) -> Array:
        """Attends from queries to keys.

        Args:
          inputs_q: Queries, `(..., length, in_features)`.
          inputs_k: Keys, `(..., length of keys, in_kv_features)`; by default the queries.
          inputs_v: Values; by default the keys.
          inputs_kv: Keys and values in one.
          mask: What is attended to, `(..., num_heads or 1, length, length of keys)`.
          deterministic: No dropout; by default what the layer was set to.
          dropout_rng: A key for dropout, or streams of which `dropout` gives it; by default the
            layer's own stream.
          sow_weights: Records the weights as `attention_weights` for `nnx.capture`.

        Raises:
          ValueError: Arguments that exclude each other; a cache that does not exist or has another
            shape; dropout that is neither wanted nor unwanted.
        """
        if inputs_kv is not None:
            if inputs_k is not None or inputs_v is not None:
                raise ValueError("inputs_kv: it stands for inputs_k and inputs_v, give no other")
            inputs_k = inputs_v = inputs_kv
        if inputs_k is None:
            if inputs_v is not None:
                raise ValueError(
                    "inputs_v: without inputs_k there is nothing that they are the values of; for "
                    "both the same, give inputs_k alone"
                )
            inputs_k = inputs_q
        if inputs_v is None:
            inputs_v = inputs_k
        query, key, value = self.query(inputs_q), self.key(inputs_k), self.value(inputs_v)
        if self.normalize_qk:
            query, key = self.query_ln(query), self.key_ln(key)
        if self.decode:
            key, value, written = self._from_cache(query, key, value)
            mask = nn.combine_masks(mask, written)
        deterministic, rng = self._dropout(deterministic, dropout_rng)
        settings = {
            "mask": mask,
            "dropout_rng": rng,
            "dropout_rate": self.dropout_rate,
            "broadcast_dropout": self.broadcast_dropout,
            "deterministic": deterministic,
            "dtype": self.dtype,
            "precision": self.precision,
            "force_fp32_for_softmax": self.force_fp32_for_softmax,
            "qk_attn_weights_einsum": made(self.qk_attn_weights_einsum_cls),
            "attn_weights_value_einsum": made(self.attn_weights_value_einsum_cls),
        }
        known = inspect.signature(self.attention_fn).parameters
        settings = {name: x for name, x in settings.items() if name in known}
        if sow_weights:
            settings["module"] = Recorder(self)
        return self.out(self.attention_fn(query, key, value, **settings))

    def init_cache(self, input_shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> None:
        """Makes an empty cache, as Linen's `init` does for inputs of this shape and dtype.

        Args:
          input_shape: `(..., longest length, in_features)`.
          dtype: The dtype of the inputs.

        Example:
            >>> attention = SelfAttention(2, 8, decode=True, rngs=nnx.Rngs(0))
            >>> attention.init_cache((1, 5, 8))
            >>> y = attention(jnp.ones((1, 1, 8)))
            >>> attention.cached_key.shape, int(attention.cache_index[...])
            ((1, 5, 2, 4), 1)
        """
        keys = (*input_shape[:-1], self.in_kv_features)
        entry = jax.eval_shape(self.key, jax.ShapeDtypeStruct(keys, dtype))
        self.cached_key = nnx.Cache(jnp.zeros(entry.shape, entry.dtype))
        self.cached_value = nnx.Cache(jnp.zeros(entry.shape, entry.dtype))
        self.cache_index = nnx.Cache(jnp.array(0, jnp.int32))

    def _from_cache(self, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
        """All keys and values so far, and which of them have been written."""
        if not hasattr(self, "cached_key"):
            raise ValueError(
                f"decode: {type(self).__name__} has no cache yet; call init_cache(input_shape) "
                "with the longest length first"
            )
        *batch, length, heads, depth = self.cached_key.shape
        if query.shape != (*batch, 1, heads, depth):
            raise ValueError(
                f"inputs_q: with a cache of {length} steps a call takes one, so the queries must "
                f"have the shape {(*batch, 1, heads, depth)}; got {query.shape}"
            )
        index = self.cache_index[...]
        zero = jnp.array(0, index.dtype)
        start = (*(zero for _ in batch), index, zero, zero)
        key = lax.dynamic_update_slice(self.cached_key[...], key, start)
        value = lax.dynamic_update_slice(self.cached_value[...], value, start)
        self.cached_key.set_value(key)
        self.cached_value.set_value(value)
        self.cache_index.set_value(index + 1)
        return key, value, jnp.broadcast_to(jnp.arange(length) <= index, (*batch, 1, 1, length))

    def _dropout(self, deterministic: bool | None, rng: Key | None) -> tuple[bool, Array | None]:
        if not self.dropout_rate > 0.0:
            return True, None if isinstance(rng, nnx.Rngs | nnx.RngStream) else rng
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic is None:
            raise ValueError(
                f"deterministic: {type(self).__name__} must be told whether to drop; give it "
                "to the constructor or the call, or call model.train() or model.eval()"
            )
        if deterministic:
            return True, None
        stream: Any = self.rngs if rng is None else rng
        stream = stream.dropout if isinstance(stream, nnx.Rngs) else stream
        return False, stream() if isinstance(stream, nnx.RngStream) else stream


class MultiHeadAttention(MultiHeadDotProductAttention):
    """`flax.linen.MultiHeadAttention`, the other name of `MultiHeadDotProductAttention`.

    Args: as of that.

    Example:
        >>> MultiHeadAttention(2, 8, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 8))).shape
        (1, 5, 8)
    """


class SelfAttention(MultiHeadDotProductAttention):
    """`flax.linen.SelfAttention`: queries, keys and values are the same.

    Args: as of `MultiHeadDotProductAttention`.

    Example:
        >>> SelfAttention(2, 8, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 8)), jnp.ones((5, 5))).shape
        (1, 5, 8)
    """

    def __call__(  # type: ignore[override]
        self,
        inputs_q: Array,
        mask: Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: Key | None = None,
        sow_weights: bool = False,
    ) -> Array:
        """As `MultiHeadDotProductAttention`, of one input."""
        return super().__call__(
            inputs_q,
            mask=mask,
            deterministic=deterministic,
            dropout_rng=dropout_rng,
            sow_weights=sow_weights,
        )

"""Linen layers and their compat twins, in the settings that the tests go through."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from nnx_bridge import compat
from tests.helpers import normal

BF16 = jnp.bfloat16
DROPOUT_KEY = jax.random.key(11)


@dataclasses.dataclass(frozen=True)
class Twin:
    """A Linen layer, the constructor of its twin, and one call of both."""

    linen: nn.Module
    make: Callable[[nnx.Rngs], nnx.Module]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def arrays(self) -> list[Any]:
        """The inputs of the call, without what is static among its arguments."""
        return [x for x in self.args if _is_input(x)]

    def filled(self, inputs: Sequence[Any]) -> list[Any]:
        """The arguments of the call with other inputs."""
        rest = iter(inputs)
        return [next(rest) if _is_input(x) else x for x in self.args]

    def variables(self, key: jax.Array) -> Any:
        return self.linen.init({"params": key}, *self.args, **self.kwargs)


def _is_input(x: Any) -> bool:
    leaves = jax.tree.leaves(x)
    return all(isinstance(leaf, jax.Array) for leaf in leaves)


def _cell(name: str, *features: Any, shape: tuple[int, ...] = (2, 3), **fields: Any) -> Twin:
    linen = getattr(nn, name)(*features, **fields)
    in_dtype = fields.get("param_dtype", jnp.float32)
    carry = linen.initialize_carry(jax.random.key(0), shape)
    carry = jax.tree.map(lambda c: c + normal(*c.shape, seed=4, dtype=c.dtype), carry)
    return Twin(
        linen,
        lambda rngs: getattr(compat, name)(shape[-1], *features, **fields, rngs=rngs),
        (carry, normal(*shape, dtype=in_dtype)),
    )


def _norm(
    name: str,
    size: Any,
    shape: tuple[int, ...] = (2, 4, 4, 6),
    x_dtype: Any = jnp.float32,
    call: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Twin:
    return Twin(
        getattr(nn, name)(**fields),
        lambda rngs: getattr(compat, name)(size, **fields, rngs=rngs),
        (normal(*shape, dtype=x_dtype) + 1,),
        call or {},
    )


def _attention(
    name: str = "MultiHeadDotProductAttention",
    inputs: int = 1,
    x_dtype: Any = jnp.float32,
    call: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Twin:
    return Twin(
        getattr(nn, name)(2, **fields),
        lambda rngs: getattr(compat, name)(2, 8, **fields, rngs=rngs),
        tuple(normal(2, 5, 8, seed=i, dtype=x_dtype) for i in range(inputs)),
        call or {},
    )


def _local(shape: tuple[int, ...], *features: Any, **fields: Any) -> Twin:
    ndim = 1 if isinstance(features[1], int) else len(features[1])
    return Twin(
        nn.ConvLocal(*features, **fields),
        lambda rngs: compat.ConvLocal(
            shape[-1], *features, spatial_shape=shape[-1 - ndim : -1], **fields, rngs=rngs
        ),
        (normal(*shape),),
    )


def _fp8(name: str, **fields: Any) -> Twin:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        linen = getattr(nn, name)(**fields)
    return Twin(
        linen,
        lambda rngs: getattr(compat, name)(**fields),
        (normal(2, 3), normal(3, 4), (((1,), (0,)), ((), ()))),
    )


def _averaged(query: jax.Array, key: jax.Array, value: jax.Array, mask: Any = None) -> jax.Array:
    """An attention that knows nothing of dropout."""
    return query + key.mean(-3, keepdims=True) * value


_AXES: Any = {"feature_axes": (-2, -1), "reduction_axes": (-2, -1)}
_MASK = jnp.arange(4)[:, None, None] < jnp.array([3, 4])[:, None, None, None]
_EVAL = {"use_running_average": True}
_TRAIN = {"use_running_average": False}
_MASK_OF_5 = jnp.tril(jnp.ones((5, 5)))
_KEYS = {"deterministic": False, "dropout_rng": DROPOUT_KEY}

CELLS = {
    "LSTMCell": _cell("LSTMCell", 4),
    "LSTMCell, relu": _cell("LSTMCell", 4, activation_fn=nn.relu, gate_fn=nn.hard_sigmoid),
    "LSTMCell, bfloat16": _cell("LSTMCell", 4, dtype=BF16),
    "OptimizedLSTMCell": _cell("OptimizedLSTMCell", 4),
    "OptimizedLSTMCell, bfloat16": _cell("OptimizedLSTMCell", 4, dtype=BF16),
    "GRUCell": _cell("GRUCell", 4),
    "GRUCell, bfloat16": _cell("GRUCell", 4, dtype=BF16, bias_init=nn.initializers.normal()),
    "MGUCell": _cell("MGUCell", 4),
    "MGUCell, no reset gate": _cell("MGUCell", 4, reset_gate=False, dtype=BF16),
    "SimpleCell": _cell("SimpleCell", 4, residual=True),
    "SimpleCell, bfloat16 parameters": _cell(
        "SimpleCell", 4, param_dtype=BF16, recurrent_kernel_init=nn.initializers.lecun_normal()
    ),
    "ConvLSTMCell": _cell("ConvLSTMCell", 4, (2, 2), shape=(2, 5, 5, 3)),
    "ConvLSTMCell, bfloat16": _cell(
        "ConvLSTMCell", 2, (3,), shape=(2, 5, 3), use_bias=False, dtype=BF16
    ),
}

NORMS = {
    "LayerNorm": _norm("LayerNorm", 6),
    "LayerNorm, several axes": _norm("LayerNorm", (4, 6), **_AXES),
    "LayerNorm, axes from the front": _norm(
        "LayerNorm", (4, 6), feature_axes=(1, -1), reduction_axes=(1, 2, 3), use_bias=False
    ),
    "LayerNorm, mixed precision": _norm("LayerNorm", 6, dtype=BF16),
    "LayerNorm, bfloat16": _norm("LayerNorm", 6, x_dtype=BF16, dtype=BF16, param_dtype=BF16),
    "LayerNorm, half-precision reductions": _norm(
        "LayerNorm", 6, x_dtype=BF16, param_dtype=BF16, force_float32_reductions=False
    ),
    "LayerNorm, slow variance": _norm("LayerNorm", 6, use_fast_variance=False, use_scale=False),
    "LayerNorm, mask": _norm("LayerNorm", 6, call={"mask": jnp.arange(6) < 4}),
    "RMSNorm": _norm("RMSNorm", 6),
    "RMSNorm, mixed precision": _norm("RMSNorm", 6, dtype=BF16),
    "RMSNorm, several axes": _norm("RMSNorm", (4, 6), **_AXES),
    "GroupNorm": _norm("GroupNorm", 6, num_groups=3),
    "GroupNorm, group size": _norm("GroupNorm", 6, num_groups=None, group_size=2, dtype=BF16),
    "GroupNorm, each place": _norm("GroupNorm", 6, num_groups=3, reduction_axes=(-1,)),
    "GroupNorm, mask": _norm(
        "GroupNorm", 6, num_groups=3, call={"mask": jnp.ones((2, 4, 4, 6), bool)}
    ),
    "InstanceNorm": _norm("InstanceNorm", 6),
    "InstanceNorm, several axes": _norm("InstanceNorm", (4, 6), feature_axes=(1, -1)),
    "InstanceNorm, mixed precision": _norm("InstanceNorm", 6, dtype=BF16),
    "BatchNorm, training": _norm("BatchNorm", 6, call=_TRAIN),
    "BatchNorm, evaluation": _norm("BatchNorm", 6, call=_EVAL, momentum=0.5),
    "BatchNorm, mixed precision": _norm("BatchNorm", 6, dtype=BF16, **_TRAIN),
    "BatchNorm, bfloat16": _norm("BatchNorm", 6, x_dtype=BF16, param_dtype=BF16, call=_EVAL),
    "BatchNorm, half-precision reductions": _norm(
        "BatchNorm",
        6,
        x_dtype=BF16,
        param_dtype=BF16,
        force_float32_reductions=False,
        call=_TRAIN,
    ),
    "BatchNorm, several axes": _norm("BatchNorm", (4, 6), axis=(1, -1), call=_TRAIN),
    "BatchNorm, mask": _norm("BatchNorm", 6, call={**_TRAIN, "mask": _MASK}),
}

ATTENTION = {
    "attention": _attention(),
    "attention of others": _attention(inputs=3, normalize_qk=True, qkv_features=6, out_features=4),
    "attention, bfloat16": _attention("MultiHeadAttention", x_dtype=BF16, param_dtype=BF16),
    "attention, mixed precision": _attention("MultiHeadAttention", dtype=BF16, normalize_qk=True),
    "attention, float32 softmax": _attention(
        "MultiHeadAttention", dtype=BF16, force_fp32_for_softmax=True, use_bias=False
    ),
    "attention, dropout": _attention(dropout_rate=0.3, call=_KEYS),
    "attention, dropout of each head": _attention(
        dropout_rate=0.3, broadcast_dropout=False, call=_KEYS
    ),
    "attention, own function": _attention(attention_fn=_averaged),
    "self attention, mask": _attention("SelfAttention", call={"mask": _MASK_OF_5}),
}

LOCAL = {
    "ConvLocal": _local((2, 5, 3), 4, (2,)),
    "ConvLocal, strides": _local((6, 6, 2), 3, (2, 2), strides=2, padding="VALID", dtype=BF16),
    "ConvLocal, circular": _local((2, 5, 3), 4, 2, padding="CIRCULAR", kernel_dilation=3),
    "ConvLocal, reflected": _local((2, 5, 3), 4, (2,), padding="REFLECT", use_bias=False),
    "ConvLocal, causal": _local((2, 3, 5, 3), 4, (3,), padding="CAUSAL"),
    "ConvLocal, mask": _local(
        (2, 4, 3), 2, (2,), padding=[(1, 0)], mask=jnp.arange(4 * 6 * 2).reshape(4, 6, 2) % 2
    ),
}

WITH_KEYS = {**CELLS, **NORMS, **ATTENTION, **LOCAL}
"""Layers that give the same parameters for the same key."""


def _around(
    name: str,
    layer: nn.Module,
    make: Callable[[nnx.Rngs], nnx.Module],
    x: jax.Array,
    call: Mapping[str, Any],
    **fields: Any,
) -> Twin:
    return Twin(
        getattr(nn, name)(layer, **fields),
        lambda rngs: getattr(compat, name)(make(rngs), **fields, rngs=rngs),
        (x,),
        call,
    )


def _dense(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Linear(3, 4, rngs=rngs)


def _conv(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Conv(3, 4, (2,), rngs=rngs)


def _small_attention(rngs: nnx.Rngs) -> nnx.Module:
    return compat.MultiHeadAttention(2, 4, rngs=rngs)


def _small_norm(rngs: nnx.Rngs) -> nnx.Module:
    return compat.BatchNorm(3, use_running_average=False, rngs=rngs)


_X, _X3 = normal(2, 3), normal(2, 5, 3)
_KEEP, _UPDATE = {"update_stats": False}, {"update_stats": True}

AROUND_OTHERS = {
    "WeightNorm": _around("WeightNorm", nn.Dense(4), _dense, _X, {}),
    "WeightNorm, everything": _around(
        "WeightNorm", nn.Dense(4), _dense, _X, {}, variable_filter=None, dtype=BF16
    ),
    "WeightNorm, no scale": _around("WeightNorm", nn.Dense(4), _dense, _X, {}, use_scale=False),
    "WeightNorm, one norm": _around(
        "WeightNorm", nn.Conv(4, (2,)), _conv, _X3, {}, feature_axes=None
    ),
    "WeightNorm, several axes": _around(
        "WeightNorm", nn.Conv(4, (2,)), _conv, _X3, {}, feature_axes=(0, -1)
    ),
    "WeightNorm of attention": _around(
        "WeightNorm",
        nn.MultiHeadAttention(2),
        _small_attention,
        normal(1, 3, 4),
        {},
        variable_filter={"query", "out"},
    ),
    "SpectralNorm": _around("SpectralNorm", nn.Dense(4), _dense, _X, _UPDATE),
    "SpectralNorm, no update": _around("SpectralNorm", nn.Dense(4), _dense, _X, _KEEP),
    "SpectralNorm, convolution": _around(
        "SpectralNorm", nn.Conv(4, (2,)), _conv, _X3, _UPDATE, n_steps=3, dtype=BF16
    ),
    "SpectralNorm of attention": _around(
        "SpectralNorm", nn.MultiHeadAttention(2), _small_attention, normal(1, 3, 4), _UPDATE
    ),
    "Sequential": Twin(
        nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]),
        lambda rngs: compat.Sequential(
            [nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs)]
        ),
        (_X,),
    ),
    "Dropout": Twin(
        nn.Dropout(0.4),
        lambda rngs: compat.Dropout(0.4),
        (_X, False, DROPOUT_KEY),
    ),
    "Dropout, broadcast": Twin(
        nn.Dropout(0.4, broadcast_dims=(0,), deterministic=False),
        lambda rngs: compat.Dropout(0.4, (0,), False),
        (_X,),
        {"rng": DROPOUT_KEY},
    ),
    "Fp8DotGeneralOp": _fp8("Fp8DotGeneralOp"),
    "Fp8DirectDotGeneralOp": _fp8("Fp8DirectDotGeneralOp", amax_history_length=8),
    "Fp8DotGeneral": _fp8("Fp8DotGeneral"),
    "NANOOFp8DotGeneralOp": _fp8("NANOOFp8DotGeneralOp"),
    "Fp8Einsum": Twin(
        nn.Fp8Einsum(),
        lambda rngs: compat.Fp8Einsum(),
        ("ab,bc->ac", _X, normal(3, 4)),
    ),
}
"""Layers around others, and layers without parameters."""

TWINS = {**WITH_KEYS, **AROUND_OTHERS}

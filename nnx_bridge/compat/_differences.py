"""The table of differences between Flax Linen and Flax NNX.

Every public layer of `flax.linen` has a row here; lifted transforms and the rest of the API have
theirs in `_api_differences.py`. The tests execute what each row says against the installed flax, so
a row that has become wrong, and a layer without a row, fail them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from nnx_bridge.compat._api_differences import API
from nnx_bridge.compat._difference import Difference, find, unknown

# The settings at which the normalisation layers of the two agree.
_WIDE = (None, jnp.float32, jnp.float64)
_SAME_NORM: Mapping[str, tuple[Any, ...]] = {
    "dtype": _WIDE,
    "force_float32_reductions": (True,),
}
_ROUNDS_FIRST = (
    "with a half-precision `dtype`, NNX rounds the input and the parameters before it takes the "
    "statistics, Linen only the result"
)


def _ours(name: str) -> str:
    return f"nnx_bridge.compat.{name}"


_EQUAL = (
    Difference(
        "Dense",
        "Linear",
        "equal",
        "takes `in_features` first; `dot_general_cls` is now an instance, `dot_general`",
        "native",
    ),
    Difference(
        "DenseGeneral",
        "LinearGeneral",
        "equal",
        "takes `in_features` first; `batch_dims=(0,)` is now `batch_axis={0: size}`",
        "native",
    ),
    Difference(
        "Einsum",
        "Einsum",
        "equal",
        "takes the equation first and the kernel's shape second; without `bias_shape` it has no "
        "bias, where Linen's `use_bias` is True",
        "native",
    ),
    Difference("Conv", "Conv", "equal", "takes `in_features` first", "native"),
    Difference("ConvTranspose", "ConvTranspose", "equal", "takes `in_features` first", "native"),
    Difference("Embed", "Embed", "equal", "the same names and numbers", "native"),
    Difference("PReLU", "PReLU", "equal", "the same names and numbers", "native"),
    Difference(
        "LSTMCell",
        "LSTMCell",
        "equal",
        "the gate `if` is the attribute `if_`; ours keeps Linen's names",
        "native",
        compat=_ours("LSTMCell"),
    ),
    Difference(
        "RNN",
        "RNN",
        "equal",
        "takes `rngs` for the carry where Linen takes `init_key`, and keeps an RNG stream of its "
        "own; `variable_axes` and `split_rngs` are now `state_axes` and `broadcast_rngs`",
        "native",
    ),
    Difference(
        "Bidirectional",
        "Bidirectional",
        "equal",
        "keeps an RNG stream of its own, as each of its RNNs does",
        "native",
    ),
    Difference(
        "Sequential",
        "Sequential",
        "equal",
        "takes the layers as separate arguments; the parameters of `layers_0` are at `layers/0`; "
        "ours keeps Linen's names",
        "native",
        compat=_ours("Sequential"),
    ),
    Difference(
        "RNNCellBase",
        "RNNCellBase",
        "equal",
        "a base class: `initialize_carry(key, shape)` becomes `initialize_carry(shape, rngs)`",
        "native",
    ),
    Difference(
        "Module",
        "Module",
        "equal",
        "a base class: fields and `setup` or `@nn.compact` become a constructor that takes `rngs` "
        "and the sizes that Linen finds from the inputs",
        "native",
    ),
)

_NORMALISATION = (
    Difference(
        "BatchNorm",
        "BatchNorm",
        "differs",
        f"{_ROUNDS_FIRST}; the result is float32 where the parameters and the input are "
        "half-precision, since the statistics take part in the promotion; no "
        "`force_float32_reductions`; `use_running_average` is False unless it is given, where "
        "Linen asks for it",
        "compat",
        compat=_ours("BatchNorm"),
        equal_where={**_SAME_NORM, "param_dtype": (jnp.float32, jnp.float64)},
    ),
    Difference(
        "LayerNorm",
        "LayerNorm",
        "differs",
        f"{_ROUNDS_FIRST}; the parameters have one axis, so several `feature_axes` fail; no "
        "`force_float32_reductions`",
        "compat",
        compat=_ours("LayerNorm"),
        equal_where={**_SAME_NORM, "feature_axes": (-1,)},
    ),
    Difference(
        "RMSNorm",
        "RMSNorm",
        "differs",
        f"{_ROUNDS_FIRST}; the parameters have one axis, so several `feature_axes` fail; no "
        "`force_float32_reductions`",
        "compat",
        compat=_ours("RMSNorm"),
        equal_where={**_SAME_NORM, "feature_axes": (-1,)},
    ),
    Difference(
        "GroupNorm",
        "GroupNorm",
        "differs",
        f"{_ROUNDS_FIRST}; with `reduction_axes` that leave spatial axes alone, NNX gives the "
        "statistics of one group to another; no `force_float32_reductions`",
        "compat",
        compat=_ours("GroupNorm"),
        equal_where={**_SAME_NORM, "reduction_axes": (None,)},
    ),
    Difference(
        "InstanceNorm",
        "InstanceNorm",
        "differs",
        f"{_ROUNDS_FIRST}; the parameters have one axis, so several `feature_axes` fail; no "
        "`force_float32_reductions`",
        "compat",
        compat=_ours("InstanceNorm"),
        equal_where={**_SAME_NORM, "feature_axes": (-1,)},
    ),
    Difference(
        "WeightNorm",
        "WeightNorm",
        "differs",
        "a call replaces the layer's kernel by the normalised one, so the gradient is that of "
        "another function and training takes another path; the scales are no Params, so they are "
        "not trained",
        "compat",
        compat=_ours("WeightNorm"),
        until="0.12.12",
        source="google/flax#5576, google/flax#5577",
    ),
    Difference(
        "WeightNorm",
        "WeightNorm",
        "differs",
        "a call replaces the layer's kernel by the normalised one, so the gradient is that of "
        "another function and training takes another path",
        "compat",
        compat=_ours("WeightNorm"),
        since="0.12.12",
        source="google/flax#5576",
    ),
    Difference(
        "SpectralNorm",
        "SpectralNorm",
        "differs",
        "a call replaces the layer's kernel by the normalised one, even with "
        "`update_stats=False`; `update_stats` is True unless it is given, where Linen asks for it; "
        "the layer gets one argument only",
        "compat",
        compat=_ours("SpectralNorm"),
        source="google/flax#5576",
    ),
)

_NO_DOUBLE = (
    "without dropout NNX calls `jax.nn.dot_product_attention`, which rounds in other places (one "
    "unit in the last place of bfloat16); no `force_fp32_for_softmax`, no `dropout_rng` or "
    "`inputs_kv`; the cache is made by `init_cache`, and `decode` must be given"
)

_OTHERS = (
    Difference(
        "MultiHeadDotProductAttention",
        "MultiHeadAttention",
        "differs",
        _NO_DOUBLE,
        "compat",
        compat=_ours("MultiHeadDotProductAttention"),
    ),
    Difference(
        "MultiHeadAttention",
        "MultiHeadAttention",
        "differs",
        _NO_DOUBLE,
        "compat",
        compat=_ours("MultiHeadAttention"),
    ),
    Difference(
        "SelfAttention",
        None,
        "missing",
        "NNX has MultiHeadAttention only, which differs from Linen's",
        "compat",
        compat=_ours("SelfAttention"),
    ),
    Difference(
        "Dropout",
        "Dropout",
        "differs",
        "drops the same for the same key; but `deterministic` is False unless it is given, where "
        "Linen asks for it, both arguments of the call are keyword-only, and `rngs` given to the "
        "constructor become two variables of the model",
        "native",
        compat=_ours("Dropout"),
    ),
    Difference(
        "GRUCell",
        "GRUCell",
        "differs",
        "the bias of `hn` does not exist; the three gates are initialised as one matrix, so a "
        "gate's recurrent kernel is not orthogonal",
        "compat",
        compat=_ours("GRUCell"),
        source="google/flax#5594",
    ),
    Difference(
        "OptimizedLSTMCell",
        "OptimizedLSTMCell",
        "differs",
        "computes the same, but the four gates are initialised as one matrix: a gate's recurrent "
        "kernel is not orthogonal, and is smaller",
        "compat",
        compat=_ours("OptimizedLSTMCell"),
    ),
    Difference(
        "SimpleCell",
        "SimpleCell",
        "differs",
        "`dtype` is float32 by default, where Linen takes that of the inputs and parameters; the "
        "parameters of `i` and `h` are at `dense_i` and `dense_h`",
        "compat",
        compat=_ours("SimpleCell"),
        equal_where={"param_dtype": (jnp.float32,)},
    ),
    Difference(
        "MGUCell",
        None,
        "missing",
        "NNX has no minimal gated unit",
        "compat",
        compat=_ours("MGUCell"),
    ),
    Difference(
        "ConvLSTMCell",
        None,
        "missing",
        "NNX has no convolutional recurrent cell",
        "compat",
        compat=_ours("ConvLSTMCell"),
    ),
    Difference(
        "ConvLocal",
        None,
        "missing",
        "NNX has no convolution with a kernel for each place",
        "compat",
        compat=_ours("ConvLocal"),
    ),
    Difference(
        "BatchApply",
        None,
        "missing",
        "NNX has nothing that merges leading axes around a layer",
        "compat",
        compat=_ours("BatchApply"),
    ),
)

_FP8 = tuple(
    Difference(
        name,
        None,
        "missing",
        "NNX has no 8-bit floating-point products",
        "compat",
        compat=_ours(name),
    )
    for name in (
        "Fp8DotGeneral",
        "Fp8DirectDotGeneralOp",
        "Fp8DotGeneralOp",
        "NANOOFp8DotGeneralOp",
        "Fp8Einsum",
    )
)

DIFFERENCES: tuple[Difference, ...] = (*_EQUAL, *_NORMALISATION, *_OTHERS, *_FP8, *API)
"""Every row, also those that are about other versions of flax than the installed one."""


def difference(linen: str | type) -> Difference:
    """What is known about a name of `flax.linen`, for the installed version of flax.

    Args:
      linen: The name (`"GRUCell"`, `"scan"`, `"Module.sow"`), or the class. A class of your own
        that derives from a layer of Linen is answered with that layer's row.

    Raises:
      KeyError: There is no row for it.
      TypeError: ``linen`` is neither a name nor a class.

    Example:
        >>> difference("GRUCell").verdict, difference("GRUCell").compat
        ('differs', 'nnx_bridge.compat.GRUCell')
    """
    row = find(DIFFERENCES, linen)
    if row is None:
        raise unknown(linen, (known.linen for known in DIFFERENCES))
    return row

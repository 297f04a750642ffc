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


def _ours(linen: str) -> str:
    return f"nnx_bridge.compat.{linen}"


def _equal(linen: str, nnx: str, what: str, compat: str | None = None) -> Difference:
    return Difference(linen, nnx, "equal", what, "native", compat=compat)


def _differs(linen: str, nnx: str, what: str, **more: Any) -> Difference:
    return Difference(linen, nnx, "differs", what, "compat", compat=_ours(linen), **more)


def _missing(linen: str, what: str) -> Difference:
    return Difference(linen, None, "missing", what, "compat", compat=_ours(linen))


_EQUAL = (
    _equal(
        "Dense",
        "Linear",
        "takes `in_features` first; `dot_general_cls` is now an instance, `dot_general`",
    ),
    _equal(
        "DenseGeneral",
        "LinearGeneral",
        "takes `in_features` first; `batch_dims=(0,)` is now `batch_axis={0: size}`",
    ),
    _equal(
        "Einsum",
        "Einsum",
        "takes the equation first and the kernel's shape second; without `bias_shape` it has no "
        "bias, where Linen's `use_bias` is True",
    ),
    _equal("Conv", "Conv", "takes `in_features` first"),
    _equal("ConvTranspose", "ConvTranspose", "takes `in_features` first"),
    _equal("Embed", "Embed", "the same names and numbers"),
    _equal("PReLU", "PReLU", "the same names and numbers"),
    _equal(
        "LSTMCell",
        "LSTMCell",
        "the gate `if` is the attribute `if_`; ours keeps Linen's names",
        compat=_ours("LSTMCell"),
    ),
    _equal(
        "RNN",
        "RNN",
        "takes `rngs` for the carry where Linen takes `init_key`, and keeps an RNG stream of its "
        "own; `variable_axes` and `split_rngs` are now `state_axes` and `broadcast_rngs`",
    ),
    _equal(
        "Bidirectional", "Bidirectional", "keeps an RNG stream of its own, as each of its RNNs does"
    ),
    _equal(
        "Sequential",
        "Sequential",
        "takes the layers as separate arguments; the parameters of `layers_0` are at `layers/0`; "
        "ours keeps Linen's names",
        compat=_ours("Sequential"),
    ),
    _equal(
        "RNNCellBase",
        "RNNCellBase",
        "a base class: `initialize_carry(key, shape)` becomes `initialize_carry(shape, rngs)`",
    ),
    _equal(
        "Module",
        "Module",
        "a base class: fields and `setup` or `@nn.compact` become a constructor that takes `rngs` "
        "and the sizes that Linen finds from the inputs",
    ),
)

_NORMALISATION = (
    _differs(
        "BatchNorm",
        "BatchNorm",
        f"{_ROUNDS_FIRST}; the result is float32 where the parameters and the input are "
        "half-precision, since the statistics take part in the promotion; no "
        "`force_float32_reductions`; `use_running_average` is False unless it is given, where "
        "Linen asks for it",
        equal_where={**_SAME_NORM, "param_dtype": (jnp.float32, jnp.float64)},
    ),
    _differs(
        "LayerNorm",
        "LayerNorm",
        f"{_ROUNDS_FIRST}; the parameters have one axis, so several `feature_axes` fail; no "
        "`force_float32_reductions`",
        equal_where={**_SAME_NORM, "feature_axes": (-1,)},
    ),
    _differs(
        "RMSNorm",
        "RMSNorm",
        f"{_ROUNDS_FIRST}; the parameters have one axis, so several `feature_axes` fail; no "
        "`force_float32_reductions`",
        equal_where={**_SAME_NORM, "feature_axes": (-1,)},
    ),
    _differs(
        "GroupNorm",
        "GroupNorm",
        f"{_ROUNDS_FIRST}; with `reduction_axes` that leave spatial axes alone, NNX gives the "
        "statistics of one group to another; no `force_float32_reductions`",
        equal_where={**_SAME_NORM, "reduction_axes": (None,)},
    ),
    _differs(
        "InstanceNorm",
        "InstanceNorm",
        f"{_ROUNDS_FIRST}; the parameters have one axis, so several `feature_axes` fail; no "
        "`force_float32_reductions`",
        equal_where={**_SAME_NORM, "feature_axes": (-1,)},
    ),
    _differs(
        "WeightNorm",
        "WeightNorm",
        "a call replaces the layer's kernel by the normalised one, so the gradient is that of "
        "another function and training takes another path; the scales are no Params, so they are "
        "not trained",
        until="0.12.12",
        source="google/flax#5576, google/flax#5577",
    ),
    _differs(
        "WeightNorm",
        "WeightNorm",
        "a call replaces the layer's kernel by the normalised one, so the gradient is that of "
        "another function and training takes another path",
        since="0.12.12",
        source="google/flax#5576",
    ),
    _differs(
        "SpectralNorm",
        "SpectralNorm",
        "a call replaces the layer's kernel by the normalised one, even with "
        "`update_stats=False`; `update_stats` is True unless it is given, where Linen asks for it; "
        "the layer gets one argument only",
        source="google/flax#5576",
    ),
)

_NO_DOUBLE = (
    "without dropout NNX calls `jax.nn.dot_product_attention`, which rounds in other places (one "
    "unit in the last place of bfloat16); no `force_fp32_for_softmax`, no `dropout_rng` or "
    "`inputs_kv`; the cache is made by `init_cache`, and `decode` must be given"
)

_OTHERS = (
    _differs("MultiHeadDotProductAttention", "MultiHeadAttention", _NO_DOUBLE),
    _differs("MultiHeadAttention", "MultiHeadAttention", _NO_DOUBLE),
    _missing("SelfAttention", "NNX has MultiHeadAttention only, which differs from Linen's"),
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
    _differs(
        "GRUCell",
        "GRUCell",
        "the bias of `hn` does not exist; the three gates are initialised as one matrix, so a "
        "gate's recurrent kernel is not orthogonal",
        source="google/flax#5594",
    ),
    _differs(
        "OptimizedLSTMCell",
        "OptimizedLSTMCell",
        "computes the same, but the four gates are initialised as one matrix: a gate's recurrent "
        "kernel is not orthogonal, and is smaller",
    ),
    _differs(
        "SimpleCell",
        "SimpleCell",
        "`dtype` is float32 by default, where Linen takes that of the inputs and parameters; the "
        "parameters of `i` and `h` are at `dense_i` and `dense_h`",
        equal_where={"param_dtype": (jnp.float32,)},
    ),
    _missing("MGUCell", "NNX has no minimal gated unit"),
    _missing("ConvLSTMCell", "NNX has no convolutional recurrent cell"),
    _missing("ConvLocal", "NNX has no convolution with a kernel for each place"),
    _missing("BatchApply", "NNX has nothing that merges leading axes around a layer"),
)

_FP8 = tuple(
    _missing(name, "NNX has no 8-bit floating-point products")
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

    Returns:
      The row.

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

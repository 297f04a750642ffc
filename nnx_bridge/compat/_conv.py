"""Linen's convolutional layers that NNX does not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.typing import Dtype, Initializer, PaddingLike, PrecisionLike
from jax import lax

from nnx_bridge.compat._cell import Array, Cell, Pair
from nnx_bridge.compat._layer import set_fields, set_variables, shaped, unset


class ConvFields(TypedDict, total=False):
    """Settings of ConvLSTMCell."""

    strides: Sequence[int] | None
    padding: str | Sequence[tuple[int, int]]
    use_bias: bool
    dtype: Dtype | None
    param_dtype: Dtype
    carry_init: Initializer


class ConvLSTMCell(Cell):
    """`flax.linen.ConvLSTMCell`, an LSTM of images (Shi et al., 2015, arXiv:1506.04214).

    Args:
      in_features: Channels of the inputs, `(..., *spatial, in_features)`.
      hidden_features: Channels of the carry, which Linen calls `features`.
      kernel_size: Size of the kernels, for each spatial axis.
      rngs: The stream `params` gives the parameters.
      **fields: The other fields of `flax.linen.ConvLSTMCell`, with its defaults.

    Example:
        >>> cell = ConvLSTMCell(3, 4, (2, 2), rngs=nnx.Rngs(0))
        >>> nnx.RNN(cell)(jnp.ones((2, 5, 8, 8, 3))).shape
        (2, 5, 8, 8, 4)
    """

    carries = 2

    kernel_size: Sequence[int]
    strides: Sequence[int] | None
    padding: str | Sequence[tuple[int, int]]
    use_bias: bool

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        kernel_size: Sequence[int],
        *,
        rngs: nnx.Rngs,
        **fields: Unpack[ConvFields],
    ) -> None:
        self.in_features = in_features
        self.hidden_features = hidden_features
        linen = nn.ConvLSTMCell(hidden_features, kernel_size, **fields)
        set_fields(self, linen)
        for name, size in (("ih", in_features), ("hh", hidden_features)):
            conv = nnx.Conv(
                size,
                4 * hidden_features,
                self.kernel_size,
                strides=1 if self.strides is None else self.strides,
                padding=self.padding,
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                **unset(),
            )
            setattr(self, name, conv)
        # As small as it may be: with strides, the carry and the inputs must fit each other.
        carry = shaped(1, *self.kernel_size, hidden_features)
        inputs = shaped(1, *self.kernel_size, in_features)
        set_variables(self, linen, rngs, (carry, carry), inputs)

    def __call__(self, carry: Pair, inputs: Array) -> tuple[Pair, Array]:
        c, h = carry
        gates = self._layer("ih", inputs) + self._layer("hh", h)
        i, g, f, o = jnp.split(gates, 4, axis=-1)
        new_c = nn.sigmoid(f + 1) * c + nn.sigmoid(i) * jnp.tanh(g)
        new_h = nn.sigmoid(o) * jnp.tanh(new_c)
        return (new_c, new_h), new_h

    @property
    def num_feature_axes(self) -> int:
        return len(self.kernel_size) + 1


class ConvLocalFields(TypedDict, total=False):
    """Settings of ConvLocal."""

    strides: None | int | Sequence[int]
    padding: PaddingLike
    input_dilation: None | int | Sequence[int]
    kernel_dilation: None | int | Sequence[int]
    feature_group_count: int
    use_bias: bool
    mask: Array | None
    dtype: Dtype | None
    param_dtype: Dtype
    precision: PrecisionLike
    kernel_init: Initializer
    bias_init: Initializer
    promote_dtype: Callable[..., Any]


class ConvLocal(nnx.Module):
    """`flax.linen.ConvLocal`, a convolution with a kernel of its own for each place.

    Args:
      in_features: Channels of the inputs, `(..., *spatial, in_features)`.
      out_features: Channels of the outputs, which Linen calls `features`.
      kernel_size: Size of the kernels, for each spatial axis.
      spatial_shape: Size of the inputs along each spatial axis, on which the kernels depend.
      rngs: The stream `params` gives the parameters.
      **fields: The other fields of `flax.linen.ConvLocal`, with its defaults.

    Example:
        >>> conv = ConvLocal(3, 4, (2,), spatial_shape=(5,), padding="VALID", rngs=nnx.Rngs(0))
        >>> conv(jnp.ones((1, 5, 3))).shape, conv.kernel.shape
        ((1, 4, 4), (4, 6, 4))
    """

    kernel_size: int | Sequence[int]
    strides: None | int | Sequence[int]
    padding: PaddingLike
    input_dilation: None | int | Sequence[int]
    kernel_dilation: None | int | Sequence[int]
    dtype: Dtype | None
    precision: PrecisionLike
    promote_dtype: Callable[..., Any]
    use_bias: bool
    mask: _Mask | None

    kernel: nnx.Param[Array]
    bias: nnx.Param[Array]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        spatial_shape: Sequence[int],
        rngs: nnx.Rngs,
        **fields: Unpack[ConvLocalFields],
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.spatial_shape = tuple(spatial_shape)
        twin = nn.ConvLocal(out_features, kernel_size, **fields)
        set_fields(self, twin.clone(mask=None))
        if twin.mask is not None:
            self.mask = _Mask(twin.mask)
        set_variables(self, twin, rngs, shaped(1, *spatial_shape, in_features))

    def __call__(self, inputs: Array) -> Array:
        """The convolution of `inputs`, `(..., *spatial_shape, in_features)`."""
        size = _for_each_axis(self.kernel_size, 1)
        ndim = len(size)
        batch = inputs.shape[: inputs.ndim - ndim - 1]
        x = inputs if len(batch) == 1 else inputs.reshape(-1, *inputs.shape[len(batch) :])
        dilation = _for_each_axis(self.kernel_dilation, ndim)
        x, padding = _padded(x, self.padding, size, dilation)
        kernel, bias = self.kernel[...], self.bias[...] if self.use_bias else None
        if self.mask is not None:
            kernel *= self.mask.value
        x, kernel, bias = self.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = lax.conv_general_dilated_local(
            x,
            kernel,
            _for_each_axis(self.strides, ndim),
            padding,
            filter_shape=size,
            lhs_dilation=_for_each_axis(self.input_dilation, ndim),
            rhs_dilation=dilation,
            dimension_numbers=_channels_last(ndim),
            precision=self.precision,
        )
        if bias is not None:
            y += bias.reshape(1, *bias.shape)
        return y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])


class _Mask:
    """An array that is part of the program: not a variable, and equal to one of equal numbers."""

    def __init__(self, value: Any) -> None:
        self.value = np.asarray(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mask) and np.array_equal(self.value, other.value)

    def __hash__(self) -> int:
        return hash((self.value.shape, self.value.tobytes()))


def _for_each_axis(value: None | int | Sequence[int], ndim: int) -> tuple[int, ...]:
    if value is None or isinstance(value, int):
        return (1 if value is None else value,) * ndim
    return tuple(value)


def _padded(
    x: Array, padding: PaddingLike, size: Sequence[int], dilation: Sequence[int]
) -> tuple[Array, str | list[tuple[int, int]]]:
    """The input with the padding that `lax` does not know, and the padding that is left to it."""
    if not isinstance(padding, str):
        each = [padding] * len(size) if isinstance(padding, int) else padding
        return x, [(p, p) if isinstance(p, int) else (p[0], p[1]) for p in each]
    reach = [(k - 1) * d for k, d in zip(size, dilation, strict=True)]
    modes = {"CIRCULAR": "wrap", "REFLECT": "reflect"}
    if padding in modes:
        pads = [(r // 2, (r + 1) // 2) for r in reach]
        return jnp.pad(x, [(0, 0), *pads, (0, 0)], mode=modes[padding]), "VALID"
    if padding == "CAUSAL":
        if len(reach) != 1:
            raise ValueError(
                f"padding: 'CAUSAL' is for convolutions over one axis, got the kernel {size}"
            )
        return jnp.pad(x, [(0, 0), (reach[0], 0), (0, 0)]), "VALID"
    return x, padding


def _channels_last(ndim: int) -> lax.ConvDimensionNumbers:
    spatial = tuple(range(1, ndim + 1))
    images = (0, ndim + 1, *spatial)
    return lax.ConvDimensionNumbers(images, (ndim + 1, ndim, *range(ndim)), images)

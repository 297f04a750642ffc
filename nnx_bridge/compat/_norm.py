"""What Linen's normalisation layers share.

Linen takes the statistics of the input as it is, and rounds the result alone to `dtype`; NNX rounds
the input and the parameters first. And Linen's parameters may have several axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypedDict

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Axes, Dtype, Initializer
from jax import lax

from nnx_bridge.compat._layer import set_fields, set_variables, shaped

Array: TypeAlias = jax.Array


class NormFields(TypedDict, total=False):
    """Settings of every layer."""

    epsilon: float
    dtype: Dtype | None
    param_dtype: Dtype
    use_scale: bool
    scale_init: Initializer
    axis_name: str | None
    axis_index_groups: Any
    use_fast_variance: bool
    force_float32_reductions: bool


class BiasNormFields(NormFields, total=False):
    """Settings of every layer but RMSNorm."""

    use_bias: bool
    bias_init: Initializer


class Norm(nnx.Module):
    epsilon: float
    dtype: Dtype | None
    param_dtype: Dtype
    use_bias: bool = False
    use_scale: bool
    axis_name: str | None
    axis_index_groups: Any
    use_fast_variance: bool
    force_float32_reductions: bool

    scale: nnx.Param[Array]
    bias: nnx.Param[Array]

    def __init__(
        self,
        linen: Callable[..., nn.Module],
        num_features: int | Sequence[int],
        feature_axes: Axes,
        fields: Any,
        rngs: nnx.Rngs,
        **call: Any,
    ) -> None:
        self.num_features = num_features if isinstance(num_features, int) else tuple(num_features)
        twin = linen(**fields)
        set_fields(self, twin)
        axes = [feature_axes] if isinstance(feature_axes, int) else list(feature_axes)
        sizes = [num_features] if isinstance(num_features, int) else list(num_features)
        if len(axes) != len(sizes):
            raise ValueError(
                f"num_features: {type(self).__name__} has the feature axes {tuple(axes)} and needs "
                f"the size of each, got {num_features}"
            )
        # Where there is an axis, it can be reduced over only where it is bound.
        twin = twin.clone(axis_name=None)
        example = _example(axes, sizes, getattr(self, "reduction_axes", None))
        set_variables(self, twin, rngs, example, **call)

    def _statistics(
        self, x: Array, axes: Sequence[int], mask: Array | None, *, use_mean: bool = True
    ) -> tuple[Array, Array]:
        """Mean and variance, in float32 at least unless `force_float32_reductions` is False."""
        dtype = self.dtype or jnp.result_type(x)
        if self.force_float32_reductions:
            dtype = jnp.promote_types(dtype, jnp.float32)
        x = jnp.asarray(x, dtype)
        where = None if mask is None else jnp.asarray(mask, bool)

        def means(*values: Array) -> Sequence[Array]:
            found = [v.mean(axes, where=where) for v in values]
            if self.axis_name is None:
                return found
            # Together, since each of them is one exchange between devices.
            both = found[0] if len(found) == 1 else jnp.stack(found)
            groups = self.axis_index_groups
            both = lax.pmean(both, self.axis_name, axis_index_groups=groups)
            return [both] if len(found) == 1 else [both[i] for i in range(len(found))]

        if not use_mean:
            (var,) = means(_square(x))
            return jnp.zeros_like(var), var
        if self.use_fast_variance:
            mean, square = means(x, _square(x))
            return mean, jnp.maximum(0.0, square - _square(mean))
        (mean,) = means(x)
        (var,) = means(_square(x - jnp.expand_dims(mean, tuple(axes))))
        return mean, var

    def _normalized(
        self,
        x: Array,
        mean: Array,
        var: Array,
        reduction_axes: Sequence[int],
        feature_axes: Sequence[int],
    ) -> Array:
        mean, var = (jnp.expand_dims(s, tuple(reduction_axes)) for s in (mean, var))
        shape = [size if axis in feature_axes else 1 for axis, size in enumerate(x.shape)]
        parameters = []
        y = x - mean
        factor = lax.rsqrt(var + self.epsilon)
        if self.use_scale:
            parameters.append(self._parameter(self.scale, shape))
            factor *= parameters[-1]
        y *= factor
        if self.use_bias:
            parameters.append(self._parameter(self.bias, shape))
            y += parameters[-1]
        return jnp.asarray(y, canonicalize_dtype(x, *parameters, dtype=self.dtype))

    def _parameter(self, parameter: nnx.Param[Array], shape: Sequence[int]) -> Array:
        value = parameter[...].reshape(shape)
        return value if self.force_float32_reductions else jnp.asarray(value, self.param_dtype)


def canonical(ndim: int, axes: Axes) -> tuple[int, ...]:
    """The axes counted from the front, in order, each once."""
    given = axes if isinstance(axes, Iterable) else (axes,)
    return tuple(sorted({axis % ndim for axis in given}))


def _square(x: Array) -> Array:
    if jnp.iscomplexobj(x):
        return lax.square(lax.real(x)) + lax.square(lax.imag(x))
    return lax.square(x)


def _example(
    axes: Sequence[int], sizes: Sequence[int], reduced: Axes | None
) -> jax.ShapeDtypeStruct:
    """The smallest input with axes of these sizes, and with those that are reduced."""
    others = () if reduced is None else reduced if isinstance(reduced, Iterable) else (reduced,)
    # One more for the instances, which are never features.
    ndim = max([2, *(axis + 1 if axis >= 0 else 1 - axis for axis in (*axes, *others))])
    shape = [1] * ndim
    for axis, size in zip(axes, sizes, strict=True):
        shape[axis] = size
    return shaped(*shape)

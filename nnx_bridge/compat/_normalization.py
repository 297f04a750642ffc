"""Linen's normalisation layers.

Linen takes the statistics of the input as it is, and rounds the result alone to `dtype`; NNX rounds
the input and the parameters first. And Linen's parameters may have several axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Axes, Dtype, Initializer
from jax import lax

from nnx_bridge.compat._layer import set_fields, set_variables, shaped

Array: TypeAlias = jax.Array


class _Fields(TypedDict, total=False):
    epsilon: float
    dtype: Dtype | None
    param_dtype: Dtype
    use_scale: bool
    scale_init: Initializer
    axis_name: str | None
    axis_index_groups: Any
    use_fast_variance: bool
    force_float32_reductions: bool


class _BiasFields(_Fields, total=False):
    use_bias: bool
    bias_init: Initializer


class BatchNormFields(_BiasFields, total=False):
    """Settings of BatchNorm."""

    use_running_average: bool | None
    axis: Axes
    momentum: float


class RMSNormFields(_Fields, total=False):
    """Settings of RMSNorm."""

    reduction_axes: Axes
    feature_axes: Axes


class LayerNormFields(_BiasFields, total=False):
    """Settings of LayerNorm."""

    reduction_axes: Axes
    feature_axes: Axes


class GroupNormFields(_BiasFields, total=False):
    """Settings of GroupNorm."""

    num_groups: int | None
    group_size: int | None
    reduction_axes: Axes | None


class InstanceNormFields(_BiasFields, total=False):
    """Settings of InstanceNorm."""

    feature_axes: Axes


class _Norm(nnx.Module):
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


class BatchNorm(_Norm):
    """`flax.linen.BatchNorm`: rounds the result alone to `dtype`, updates as Linen does.

    Args:
      num_features: Size of the axis `axis` of the inputs, or sizes of all of them.
      rngs: The stream `params` gives the parameters.
      **fields: The fields of `flax.linen.BatchNorm`, with its defaults. `use_running_average` is
        what a call does that does not say so itself; `train()` and `eval()` set it.

    Example:
        >>> norm = BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))
        >>> y = norm(jnp.arange(6.0).reshape(2, 3), use_running_average=False)
        >>> norm.mean[...].tolist()
        [0.75, 1.25, 1.75]
    """

    use_running_average: bool | None
    axis: Axes
    momentum: float

    mean: nnx.BatchStat[Array]
    var: nnx.BatchStat[Array]

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        rngs: nnx.Rngs,
        **fields: Unpack[BatchNormFields],
    ) -> None:
        # At initialisation statistics are neither used nor updated.
        axis = fields.get("axis", -1)
        stored = fields.get("use_running_average")
        call = {"use_running_average": False} if stored is None else {}
        super().__init__(nn.BatchNorm, num_features, axis, fields, rngs, **call)

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Normalises, and updates the statistics unless they are used.

        Args:
          x: The inputs.
          use_running_average: Whether to use the statistics; by default what the layer was set to.
          mask: Which inputs take part in new statistics, of a shape that broadcasts to `x`.

        Raises:
          ValueError: Neither the call nor the layer says whether to use the statistics.
        """
        use = self.use_running_average if use_running_average is None else use_running_average
        if use is None:
            raise ValueError(
                "use_running_average: BatchNorm must be told whether to use its statistics or to "
                "update them; give it to the constructor or the call, or call model.train() or "
                "model.eval()"
            )
        features = _canonical(x.ndim, self.axis)
        reduced = [axis for axis in range(x.ndim) if axis not in features]
        if use:
            mean, var = self.mean[...], self.var[...]
            if not self.force_float32_reductions:
                mean, var = (jnp.asarray(s, self.param_dtype) for s in (mean, var))
        else:
            mean, var = self._statistics(x, reduced, mask)
            for held, new in ((self.mean, mean), (self.var, var)):
                held.set_value(self.momentum * held[...] + (1 - self.momentum) * new)
        return self._normalized(x, mean, var, reduced, features)


class LayerNorm(_Norm):
    """`flax.linen.LayerNorm`: over several axes, and rounding the result alone to `dtype`.

    Args:
      num_features: Sizes of the axes `feature_axes` of the inputs, in that order.
      rngs: The stream `params` gives the parameters.
      **fields: The fields of `flax.linen.LayerNorm`, with its defaults.

    Example:
        >>> axes = (-2, -1)
        >>> norm = LayerNorm((4, 3), feature_axes=axes, reduction_axes=axes, rngs=nnx.Rngs(0))
        >>> norm(jnp.ones((2, 4, 3))).shape, norm.scale.shape
        ((2, 4, 3), (4, 3))
    """

    reduction_axes: Axes
    feature_axes: Axes

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        rngs: nnx.Rngs,
        **fields: Unpack[LayerNormFields],
    ) -> None:
        axes = fields.get("feature_axes", -1)
        super().__init__(nn.LayerNorm, num_features, axes, fields, rngs)

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        reduced = _canonical(x.ndim, self.reduction_axes)
        mean, var = self._statistics(x, reduced, mask)
        return self._normalized(x, mean, var, reduced, _canonical(x.ndim, self.feature_axes))


class RMSNorm(_Norm):
    """`flax.linen.RMSNorm`: over several axes, and rounding the result alone to `dtype`.

    Args:
      num_features: Sizes of the axes `feature_axes` of the inputs, in that order.
      rngs: The stream `params` gives the parameters.
      **fields: The fields of `flax.linen.RMSNorm`, with its defaults.

    Example:
        >>> RMSNorm(3, rngs=nnx.Rngs(0))(jnp.full((1, 3), 2.0)).round(3).tolist()
        [[1.0, 1.0, 1.0]]
    """

    reduction_axes: Axes
    feature_axes: Axes

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        rngs: nnx.Rngs,
        **fields: Unpack[RMSNormFields],
    ) -> None:
        axes = fields.get("feature_axes", -1)
        super().__init__(nn.RMSNorm, num_features, axes, fields, rngs)

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        reduced = _canonical(x.ndim, self.reduction_axes)
        mean, var = self._statistics(x, reduced, mask, use_mean=False)
        return self._normalized(x, mean, var, reduced, _canonical(x.ndim, self.feature_axes))


class GroupNorm(_Norm):
    """`flax.linen.GroupNorm`: any `reduction_axes`, and rounding the result alone to `dtype`.

    Args:
      num_features: Size of the last axis of the inputs.
      rngs: The stream `params` gives the parameters.
      **fields: The fields of `flax.linen.GroupNorm`, with its defaults.

    Example:
        >>> norm = GroupNorm(6, num_groups=3, rngs=nnx.Rngs(0))
        >>> norm(jnp.ones((2, 4, 4, 6))).shape
        (2, 4, 4, 6)
    """

    num_groups: int | None
    group_size: int | None
    reduction_axes: Axes | None

    def __init__(
        self, num_features: int, *, rngs: nnx.Rngs, **fields: Unpack[GroupNormFields]
    ) -> None:
        super().__init__(nn.GroupNorm, num_features, -1, fields, rngs)
        self._groups = self.num_groups or num_features // (self.group_size or num_features)

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        axes = self.reduction_axes
        axes = (*range(1, x.ndim - 1), -1) if axes is None else axes
        *reduced, _ = _canonical(x.ndim, axes)
        size = x.shape[-1] // self._groups
        if mask is not None:
            mask = mask.reshape(*mask.shape[:-1], self._groups, size)
        groups = x.reshape(*x.shape[:-1], self._groups, size)
        found = self._statistics(groups, [*reduced, x.ndim], mask)
        mean, var = (jnp.repeat(s, size, axis=-1) for s in found)
        return self._normalized(x, mean, var, reduced, (x.ndim - 1,))


class InstanceNorm(_Norm):
    """`flax.linen.InstanceNorm`: over several axes, and rounding the result alone to `dtype`.

    Args:
      num_features: Sizes of the axes `feature_axes` of the inputs, in that order.
      rngs: The stream `params` gives the parameters.
      **fields: The fields of `flax.linen.InstanceNorm`, with its defaults.

    Example:
        >>> InstanceNorm(3, rngs=nnx.Rngs(0))(jnp.ones((2, 4, 4, 3))).shape
        (2, 4, 4, 3)
    """

    feature_axes: Axes

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        rngs: nnx.Rngs,
        **fields: Unpack[InstanceNormFields],
    ) -> None:
        axes = fields.get("feature_axes", -1)
        super().__init__(nn.InstanceNorm, num_features, axes, fields, rngs)

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        features = _canonical(x.ndim, self.feature_axes)
        if 0 in features:
            raise ValueError(
                f"feature_axes: the first axis of the inputs is that of the instances, got "
                f"{self.feature_axes} for inputs of shape {x.shape}"
            )
        reduced = [axis for axis in range(1, x.ndim) if axis not in features]
        mean, var = self._statistics(x, reduced, mask)
        return self._normalized(x, mean, var, reduced, features)


def _canonical(ndim: int, axes: Axes) -> tuple[int, ...]:
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

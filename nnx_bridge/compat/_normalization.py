"""Linen's normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.typing import Axes

from nnx_bridge.compat._norm import Array, BiasNormFields, Norm, NormFields, canonical


class BatchNormFields(BiasNormFields, total=False):
    """Settings of BatchNorm."""

    use_running_average: bool | None
    axis: Axes
    momentum: float


class RMSNormFields(NormFields, total=False):
    """Settings of RMSNorm."""

    reduction_axes: Axes
    feature_axes: Axes


class LayerNormFields(BiasNormFields, total=False):
    """Settings of LayerNorm."""

    reduction_axes: Axes
    feature_axes: Axes


class GroupNormFields(BiasNormFields, total=False):
    """Settings of GroupNorm."""

    num_groups: int | None
    group_size: int | None
    reduction_axes: Axes | None


class InstanceNormFields(BiasNormFields, total=False):
    """Settings of InstanceNorm."""

    feature_axes: Axes


class BatchNorm(Norm):
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
        features = canonical(x.ndim, self.axis)
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


class _OverAxes(Norm):
    """What normalises each example over `reduction_axes`."""

    reduction_axes: Axes
    feature_axes: Axes
    _use_mean = True

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        reduced = canonical(x.ndim, self.reduction_axes)
        mean, var = self._statistics(x, reduced, mask, use_mean=self._use_mean)
        return self._normalized(x, mean, var, reduced, canonical(x.ndim, self.feature_axes))


class LayerNorm(_OverAxes):
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

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        rngs: nnx.Rngs,
        **fields: Unpack[LayerNormFields],
    ) -> None:
        axes = fields.get("feature_axes", -1)
        super().__init__(nn.LayerNorm, num_features, axes, fields, rngs)


class RMSNorm(_OverAxes):
    """`flax.linen.RMSNorm`: over several axes, and rounding the result alone to `dtype`.

    Args:
      num_features: Sizes of the axes `feature_axes` of the inputs, in that order.
      rngs: The stream `params` gives the parameters.
      **fields: The fields of `flax.linen.RMSNorm`, with its defaults.

    Example:
        >>> RMSNorm(3, rngs=nnx.Rngs(0))(jnp.full((1, 3), 2.0)).round(3).tolist()
        [[1.0, 1.0, 1.0]]
    """

    _use_mean = False

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        rngs: nnx.Rngs,
        **fields: Unpack[RMSNormFields],
    ) -> None:
        axes = fields.get("feature_axes", -1)
        super().__init__(nn.RMSNorm, num_features, axes, fields, rngs)


class GroupNorm(Norm):
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
        *reduced, _ = canonical(x.ndim, axes)
        size = x.shape[-1] // self._groups
        if mask is not None:
            mask = mask.reshape(*mask.shape[:-1], self._groups, size)
        groups = x.reshape(*x.shape[:-1], self._groups, size)
        found = self._statistics(groups, [*reduced, x.ndim], mask)
        mean, var = (jnp.repeat(s, size, axis=-1) for s in found)
        return self._normalized(x, mean, var, reduced, (x.ndim - 1,))


class InstanceNorm(Norm):
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
        features = canonical(x.ndim, self.feature_axes)
        if 0 in features:
            raise ValueError(
                f"feature_axes: the first axis of the inputs is that of the instances, got "
                f"{self.feature_axes} for inputs of shape {x.shape}"
            )
        reduced = [axis for axis in range(1, x.ndim) if axis not in features]
        mean, var = self._statistics(x, reduced, mask)
        return self._normalized(x, mean, var, reduced, features)

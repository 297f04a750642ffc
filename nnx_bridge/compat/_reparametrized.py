"""Linen's layers that compute with other weights than those they hold.

The layer inside runs as a pure function of its weights (`lifted.functionalize`), so what it holds
stays as it is, while what it writes, statistics and RNG counts, is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Axes, Dtype, Initializer
from jax import lax

from lifted import functionalize
from nnx_bridge._collections import Path, linen_path, to_variable
from nnx_bridge.compat._layer import set_fields
from nnx_bridge.compat._norm import canonical

Array: TypeAlias = jax.Array


class WeightNormFields(TypedDict, total=False):
    """Settings of WeightNorm."""

    epsilon: float
    dtype: Dtype | None
    param_dtype: Dtype
    use_scale: bool
    scale_init: Initializer
    feature_axes: Axes | None
    variable_filter: Iterable[str] | None


class SpectralNormFields(TypedDict, total=False):
    """Settings of SpectralNorm."""

    n_steps: int
    epsilon: float
    dtype: Dtype | None
    param_dtype: Dtype
    error_on_non_matrix: bool
    collection_name: str


class _Reparametrized(nnx.Module):
    """Runs `layer_instance` with other values for its Variables."""

    layer_instance: nnx.Module
    epsilon: float
    dtype: Dtype | None
    param_dtype: Dtype

    def _run(self, change: Callable[[str, Array], Array], *args: Any, **kwargs: Any) -> Any:
        functional = functionalize(self.layer_instance)
        changed = []
        for path, variable in nnx.to_flat_state(functional.variables):
            if not isinstance(variable, nnx.RngState):
                value = change(_name(path, variable), variable.get_value())
                variable = variable.replace(value)
            changed.append((path, variable))
        y, updates = functional(nnx.from_flat_state(changed), lambda layer: layer(*args, **kwargs))
        functional.publish(updates)
        return y

    def _weights(self) -> Iterable[tuple[str, nnx.Variable[Any]]]:
        for path, variable in nnx.to_flat_state(nnx.state(self.layer_instance)):
            if not isinstance(variable, nnx.RngState):
                yield _name(path, variable), variable

    def _normalize_once(self, change: Callable[[str, Array], Array]) -> None:
        """Linen's `init` leaves the weights as the first call has them."""
        changed = [(variable, change(name, variable[...])) for name, variable in self._weights()]
        for variable, value in changed:
            variable.set_value(value)


class WeightNorm(_Reparametrized):
    """`flax.linen.WeightNorm`: the layer's weights stay, and the gradient is with respect to them.

    The scale of the layer's `kernel` is the Param `layer_instance/kernel/scale`, as in Linen. As
    Linen's `init` does, the constructor normalises the layer's weights once.

    Args:
      layer_instance: The layer, of NNX or of this package.
      rngs: The stream `params` gives the scales.
      **fields: The other fields of `flax.linen.WeightNorm`, with its defaults.

    Example:
        >>> norm = WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
        >>> kernel = norm.layer_instance.kernel[...]
        >>> norm(jnp.ones((1, 3))).shape, bool((norm.layer_instance.kernel[...] == kernel).all())
        ((1, 4), True)
        >>> getattr(norm, "layer_instance/kernel/scale").shape
        (4,)
    """

    use_scale: bool
    feature_axes: Axes | None
    variable_filter: tuple[str, ...] | None

    def __init__(
        self, layer_instance: nnx.Module, *, rngs: nnx.Rngs, **fields: Unpack[WeightNormFields]
    ) -> None:
        twin = nn.WeightNorm(nn.Module(), **fields)
        set_fields(self, twin)
        self.layer_instance = layer_instance
        chosen = twin.variable_filter
        self.variable_filter = None if chosen is None else tuple(sorted(chosen))
        for name, weight in self._weights() if self.use_scale else ():
            if self._chosen(name):
                shape = [weight.shape[axis] for axis in self._features(weight.ndim)]
                scale = twin.scale_init(rngs.params(), shape, self.param_dtype)
                setattr(self, f"{name}/scale", to_variable("params", scale))
        self._normalize_once(self._normalized)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's call, with normalised weights."""
        return self._run(self._normalized, *args, **kwargs)

    def _chosen(self, name: str) -> bool:
        return not self.variable_filter or any(part in name for part in self.variable_filter)

    def _features(self, ndim: int) -> tuple[int, ...]:
        return canonical(ndim, () if self.feature_axes is None else self.feature_axes)

    def _normalized(self, name: str, weight: Array) -> Array:
        if not self._chosen(name):
            return weight
        features = self._features(weight.ndim)
        reduced = tuple(axis for axis in range(weight.ndim) if axis not in features)
        value = _unit(weight, self.epsilon, reduced)
        parts = [weight]
        if self.use_scale:
            shape = [n if axis in features else 1 for axis, n in enumerate(weight.shape)]
            parts.append(getattr(self, f"{name}/scale")[...].reshape(shape))
            value *= parts[-1]
        return jnp.asarray(value, canonicalize_dtype(*parts, dtype=self.dtype))


class SpectralNorm(_Reparametrized):
    """`flax.linen.SpectralNorm`: the layer's weights stay, and are divided by their largest
    singular value for a call.

    Of a layer's `kernel`, the estimates are the Variables `layer_instance/kernel/u` and
    `layer_instance/kernel/sigma`, as in Linen. As Linen's `init` does, the constructor normalises
    the layer's weights once.

    Args:
      layer_instance: The layer, of NNX or of this package.
      rngs: The stream `params` gives the first estimates.
      **fields: The other fields of `flax.linen.SpectralNorm`, with its defaults.

    Example:
        >>> norm = SpectralNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), n_steps=50, rngs=nnx.Rngs(1))
        >>> y = norm(jnp.ones((1, 3)), update_stats=True)
        >>> sigma = getattr(norm, "layer_instance/kernel/sigma")[...]
        >>> bool(jnp.isclose(sigma, jnp.linalg.norm(norm.layer_instance.kernel[...], 2)))
        True
    """

    n_steps: int
    error_on_non_matrix: bool
    collection_name: str

    def __init__(
        self, layer_instance: nnx.Module, *, rngs: nnx.Rngs, **fields: Unpack[SpectralNormFields]
    ) -> None:
        set_fields(self, nn.SpectralNorm(nn.Module(), **fields))
        self.layer_instance = layer_instance
        for name, weight in self._weights():
            if weight.ndim > 1 and self.n_steps > 0:
                u = jax.random.normal(rngs.params(), (1, weight.shape[-1]), self.param_dtype)
                sigma = jnp.ones((), self.param_dtype)
                setattr(self, f"{name}/u", to_variable(self.collection_name, u))
                setattr(self, f"{name}/sigma", to_variable(self.collection_name, sigma))
        self._normalize_once(functools.partial(self._normalized, update_stats=False))

    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
        """The layer's call, with weights of spectral norm one.

        Args:
          *args: Arguments of the layer.
          update_stats: Whether to keep the new estimates of the singular values.
          **kwargs: Arguments of the layer.
        """
        change = functools.partial(self._normalized, update_stats=update_stats)
        return self._run(change, *args, **kwargs)

    def _normalized(self, name: str, weight: Array, update_stats: bool) -> Array:
        if weight.ndim <= 1 or self.n_steps < 1:
            return weight
        if self.error_on_non_matrix and weight.ndim > 2:
            raise ValueError(
                f"{name}: expected a matrix, got shape {weight.shape}; with "
                "error_on_non_matrix=False it is taken as one of its last axis and all others"
            )
        matrix = weight if weight.ndim == 2 else weight.reshape(-1, weight.shape[-1])
        held = getattr(self, f"{name}/u")
        u = held[...]
        for _ in range(self.n_steps):
            v = _unit(jnp.matmul(u, matrix.transpose([1, 0])), self.epsilon)
            u = _unit(jnp.matmul(v, matrix), self.epsilon)
        u, v = lax.stop_gradient(u), lax.stop_gradient(v)
        sigma = jnp.matmul(jnp.matmul(v, matrix), jnp.transpose(u))[0, 0]
        matrix /= jnp.where(sigma != 0, sigma, 1)
        if update_stats:
            held.set_value(u)
            getattr(self, f"{name}/sigma").set_value(sigma)
        dtype = canonicalize_dtype(weight, u, v, sigma, dtype=self.dtype)
        return jnp.asarray(matrix.reshape(weight.shape), dtype)


def _name(path: Path, variable: nnx.Variable[Any]) -> str:
    """What Linen calls a Variable of the layer."""
    return "/".join(map(str, ("layer_instance", *linen_path(path, variable)[1:])))


def _unit(x: Array, epsilon: float, axes: Sequence[int] | None = None) -> Array:
    axis = None if axes is None else tuple(axes)
    return x * lax.rsqrt((x * x).sum(axis=axis, keepdims=True) + epsilon)

"""`reduce_axes`: gradients of what is broadcast over a named axis, summed over that axis.

Under `jax.vmap` a custom batching rule sees which operands are mapped over the axis. Under
`jax.shard_map` nothing is to be done: there JAX itself sums the gradient of a value that does not
vary over a mesh axis (with ``check_vma=True``, the default; without it JAX does not know what
varies, and no sum is taken).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap


def axis_names(name: str, axes: Any) -> tuple[Any, ...]:
    """``axes`` as a tuple.

    Raises:
      TypeError: ``axes`` is not a sequence of names.
      ValueError: an axis is not bound by an enclosing map.
    """
    if isinstance(axes, str) or not isinstance(axes, Sequence):
        raise TypeError(
            f"{name}: reduce_axes: expected a sequence of axis names, got {axes!r}; write "
            f"({axes!r},)."
        )
    for axis in axes:
        try:
            lax.axis_index(axis)
        except NameError:
            raise ValueError(
                f"{name}: reduce_axes={tuple(axes)!r}: no axis {axis!r} is mapped here. Call this "
                f"inside jax.vmap(..., axis_name={axis!r}) or a jax.shard_map over it."
            ) from None
    return tuple(axes)


def psum_broadcast(
    values: Sequence[Any], grads: Sequence[Any], axes: Sequence[Any]
) -> Sequence[Any]:
    """``grads`` summed over each of ``axes`` over which they vary while their value does not."""
    for axis in axes:
        grads = [_sum_mapped(axis, value, grad) for value, grad in zip(values, grads, strict=True)]
    return grads


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_mapped(axis: Any, value: Any, grad: Any) -> Any:
    """``grad``, summed over ``axis`` where it is mapped over it and ``value`` is not."""
    return _sum_where(value, grad, grad, lax.axis_index(axis))


@_sum_mapped.defjvp
def _sum_mapped_jvp(axis: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
    # A custom_vmap cannot be transposed, so the sum that is differentiated is a psum, and only the
    # question whether to take it goes through one.
    (value, grad), (_, t_grad) = primals, tangents
    size = _sum_where(
        lax.stop_gradient(value), lax.stop_gradient(grad), jnp.int32(1), lax.axis_index(axis)
    )
    return _sum_mapped(axis, value, grad), jnp.where(size > 1, lax.psum(t_grad, axis), t_grad)


@custom_vmap
def _sum_where(value: Any, marker: Any, x: Any, index: Any) -> Any:
    """``x``; when mapped over the axis of ``index``, its sum if ``marker`` is mapped too and
    ``value`` is not."""
    return x


@_sum_where.def_vmap
def _(axis_size: int, mapped: Any, value: Any, marker: Any, x: Any, index: Any) -> tuple[Any, bool]:
    value_mapped, marker_mapped, x_mapped, at_axis = mapped
    if not at_axis:
        return _sum_where(value, marker, x, index), x_mapped
    if marker_mapped and not value_mapped:
        return x.sum(0) if x_mapped else x * axis_size, False
    return x, x_mapped

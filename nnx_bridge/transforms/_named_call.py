"""`named_call`: a method with a name in profiles."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def named_call(class_fn: Callable[..., Any], force: bool = True) -> Callable[..., Any]:
    """`flax.linen.named_call` on NNX: a method whose operations carry its name in profiles.

    Args:
      class_fn: the method.
      force: as in Linen; NNX has no switch that would turn names off, so it makes no difference.

    Returns:
      The method. Its name is that of the class, with that of the method unless it is ``__call__``.

    Example:
      >>> import nnx_bridge as nn
      >>> from flax import nnx
      >>> class Double(nnx.Module):
      ...     @nn.named_call
      ...     def __call__(self, x):
      ...         return 2 * x
      >>> Double()(3.0)
      6.0

    Source: https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    name = getattr(class_fn, "__name__", type(class_fn).__name__)
    suffix = "" if name == "__call__" else f".{name}"

    @functools.wraps(class_fn)
    def named(self: Any, *args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(f"{type(self).__name__}{suffix}"):
            return class_fn(self, *args, **kwargs)

    return named

"""Filters of Variables: Linen's collection filters and NNX's filters in one.

A name is that of a Linen collection and selects the Variables whose type stands for exactly that
collection. A type selects its subclasses too, as in NNX.
"""

from collections.abc import Callable, Collection
from typing import Any

from flax import nnx
from flax.core import DenyList

from nnx_bridge._variable_types import collection_name

Predicate = Callable[[tuple[Any, ...], Any], bool]


def to_predicate(filter: Any) -> Predicate:
    """The predicate ``(path, leaf) -> bool`` of a filter.

    Args:
      filter: a bool; a collection's name; a `flax.core.DenyList`; a Variable type, a predicate or
        any other NNX filter; or a sequence of these, any of which may hold.

    Raises:
      TypeError: ``filter`` is none of these.

    Example:
      >>> from flax import nnx
      >>> to_predicate(["params", nnx.RngState])(("kernel",), nnx.Param(1.0))
      True
    """
    if isinstance(filter, bool):
        return lambda path, leaf: filter
    if isinstance(filter, str):
        return lambda path, leaf: _collection(leaf) == filter
    if isinstance(filter, DenyList):
        denied = to_predicate(filter.deny)
        return lambda path, leaf: not denied(path, leaf)
    if isinstance(filter, Collection):
        predicates = [to_predicate(f) for f in filter]
        return lambda path, leaf: any(predicate(path, leaf) for predicate in predicates)
    try:
        return nnx.filterlib.to_predicate(filter)
    except (TypeError, ValueError):  # Flax's own message for what is no filter cannot be formatted.
        raise TypeError(
            "filter: expected a bool, the name of a collection such as 'params', a Variable type "
            "such as nnx.Param, a predicate (path, value) -> bool, or a sequence of these; got "
            f"{filter!r}."
        ) from None


def _collection(leaf: Any) -> str | None:
    return collection_name(type(leaf)) if isinstance(leaf, nnx.Variable) else None

"""Filters of Variables: Linen's collection filters and NNX's filters in one.

A name is that of a Linen collection and selects the Variables whose type stands for exactly that
collection. A type selects its subclasses too, as in NNX.
"""

from collections.abc import Callable, Collection
from typing import Any

from flax import nnx
from flax.core import DenyList
from flax.core.scope import in_filter

from lifted._errors import Path
from lifted._group import Filter
from nnx_bridge import _flax_private
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


def visibility(variables: Filter, frozen: Filter, rngs: Filter) -> Predicate:
    """Whether a leaf is visible: RNG state by the name of its stream, all else by the filters."""
    filters = [f for f in (variables, frozen) if f is not False]
    of_variables = to_predicate(filters[0] if len(filters) == 1 else filters)
    stream = to_predicate(rngs) if not _names_streams(rngs) else None

    def visible(path: Path, leaf: Any) -> bool:
        if not issubclass(type(leaf), nnx.Variable):  # Faster than NNX's `isinstance`.
            return True
        name = _flax_private.rng_stream(leaf)
        if name is None:
            return of_variables(path, leaf)
        return in_filter(rngs, name) if stream is None else stream(path, leaf)

    return visible


def _names_streams(rngs: Filter) -> bool:
    return isinstance(rngs, (bool, str, DenyList)) or (
        isinstance(rngs, Collection) and all(isinstance(r, str) for r in rngs)
    )


def _collection(leaf: Any) -> str | None:
    # Faster than NNX's `isinstance`.
    return collection_name(type(leaf)) if issubclass(type(leaf), nnx.Variable) else None

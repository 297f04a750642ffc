"""Which Variable type stands for which Linen collection.

Flax's registry says so, in which users may enter their own pairs. An unknown collection gets a new
type there, a class that is no attribute of any module. So that what holds such Variables can be
pickled, and comes back in a process that has not seen the collection yet, `TYPES` has them all.
"""

from __future__ import annotations

import sys
from typing import Any
from urllib.parse import quote, unquote

from flax import nnx


def variable_type(collection: str) -> type[nnx.Variable[Any]]:
    """The Variable type of a Linen collection; an unknown collection gets a new type.

    Use it to select Variables of a collection that Flax has no type for: `nnx.state(model,
    variable_type("ema"))`.

    Args:
      collection: The collection's name.

    Returns:
      The type that Flax's registry has for it.

    Example:
        >>> variable_type("batch_stats").__name__
        'BatchStat'
    """
    kind = nnx.variable_type_from_name(collection, allow_register=True)
    if kind.__module__ == _OF_FLAX and not hasattr(sys.modules[_OF_FLAX], kind.__qualname__):
        kind.__module__, kind.__qualname__ = __name__, f"TYPES.{_quoted(collection)}"
    return kind


def collection_name(variable_type: type[nnx.Variable[Any]]) -> str:
    """The Linen collection of a Variable type, the inverse of `variable_type`.

    Args:
      variable_type: The type; one that is not registered is entered under the name of its class.

    Returns:
      The collection's name.

    Raises:
      ValueError: The class is not registered, and its name is that of another collection.

    Example:
        >>> collection_name(nnx.BatchStat)
        'batch_stats'
    """
    try:
        return nnx.variable_name_from_type(variable_type, allow_register=True)
    except ValueError as error:
        name = variable_type.__name__
        raise ValueError(
            f"the Variable type {variable_type.__module__}.{variable_type.__qualname__} has no "
            f"Linen collection, and {name!r} is that of {nnx.variable_type_from_name(name)}; give "
            "it one with nnx.register_variable_name(<collection>, <type>)"
        ) from error


class _Types:
    """Has the type of each collection as an attribute, where `pickle` looks for it."""

    def __getattr__(self, quoted: str) -> type[nnx.Variable[Any]]:
        if quoted.startswith("__"):  # Python asks every object for such names.
            raise AttributeError(quoted)
        return variable_type(unquote(quoted))


def _quoted(collection: str) -> str:
    # A dot would lead to an attribute of an attribute.
    return quote(collection, safe="").replace(".", "%2E").replace("__", "%5F_")


TYPES = _Types()
_OF_FLAX = nnx.Variable.__module__

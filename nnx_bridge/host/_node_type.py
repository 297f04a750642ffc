"""The classes of nodes: one for each Linen class, with its name; and how pickles name them."""

from __future__ import annotations

import copyreg
import weakref
from typing import Any, TypeVar

from flax import linen as nn
from flax import nnx


class NodeType(type(nnx.Module)):  # type: ignore[misc]
    """The type of the classes of nodes, which are found again by the Linen class they stand for."""


N = TypeVar("N", bound=nnx.Module)
_types: weakref.WeakKeyDictionary[type[nn.Module], dict[Any, Any]] = weakref.WeakKeyDictionary()


def node_type(kind: type[nn.Module] | None, base: type[N]) -> type[N]:
    """The subclass of ``base`` that has the name of a Linen class; always the same."""
    if kind is None:
        return base
    of_kind = _types.setdefault(kind, {})
    if base not in of_kind:
        made: Any = NodeType(kind.__name__, (base,), {"__doc__": kind.__doc__})
        made.__module__, made.__qualname__ = kind.__module__, kind.__qualname__
        # Weakly, so that a class lives no longer than its last user.
        made._kind, made._base = weakref.ref(kind), base
        of_kind[base] = made
    return of_kind[base]


def _by_kind(made: Any) -> Any:
    """How `pickle` finds a class: those of `node_type` are not attributes of their modules."""
    kind = made._kind and made._kind()
    return made.__qualname__ if kind is None else (sent_type, (sent(kind), made._base))


copyreg.pickle(NodeType, _by_kind)


def sent(kind: type[nn.Module]) -> Any:
    """A Linen class as it is pickled: one that `unhost` has made as what it is made of."""
    return vars(kind).get("_migration", kind)


def received(kind: Any) -> type[nn.Module]:
    """The inverse of `sent`."""
    made: type[nn.Module] = getattr(kind, "module_class", kind)
    return made


def sent_type(kind: Any, base: type[N]) -> type[N]:
    """The class of a node, of a Linen class as it was pickled."""
    return node_type(received(kind), base)

"""Whether a graph of NNX objects is still the one that it was: the same objects in the same places.

The values of Variables do not count here. Comparing attributes by identity is several times cheaper
than describing the graph once more.
"""

import operator
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from lifted._trees import identical
from nnx_bridge import _flax_private

_CONTAINERS = (dict, list, tuple)


class Snapshot:
    """The attributes of the nodes of a graph at one moment."""

    def __init__(self, nodes: Iterable[Any]) -> None:
        self._modules = [
            (node, dict(vars(node)), _containers(node))
            for node in nodes
            # All Variables are plain ones here, and `isinstance` of NNX is slow.
            if not issubclass(type(node), nnx.Variable) and hasattr(node, "__dict__")
        ]

    def holds(self) -> bool:
        """Whether every node still has the attributes that it had."""
        return all(
            _same(before, node)
            and all(_same_container(c, vars(node)[name]) for name, c in containers.items())
            for node, before, containers in self._modules
        )


def _containers(node: Any) -> dict[str, Any]:
    """Copies of the attributes that may be changed in place."""
    return {
        name: jax.tree.map(lambda x: x, value, is_leaf=_is_node)
        for name, value in vars(node).items()
        if type(value) in _CONTAINERS and _is_mutable(value)
    }


def _is_mutable(value: Any) -> bool:
    return type(value) is not tuple or any(type(x) in _CONTAINERS and _is_mutable(x) for x in value)


def _is_node(x: Any) -> bool:
    return isinstance(x, (nnx.Pytree, nnx.Variable))


def _same(before: dict[str, Any], node: Any) -> bool:
    after = vars(node)
    if list(before) == list(after) and all(map(operator.is_, before.values(), after.values())):
        return True
    # What NNX itself keeps among the attributes may change, and so may their order.
    before, after = _flax_private.attributes(before), _flax_private.attributes(after)
    if before.keys() != after.keys():
        return False
    return all(x is after[n] or _same_container(x, after[n]) for n, x in before.items())


def _same_container(before: Any, after: Any) -> bool:
    if type(before) is not type(after) or type(before) not in _CONTAINERS:
        return False
    return identical(before, after, is_leaf=_is_node)

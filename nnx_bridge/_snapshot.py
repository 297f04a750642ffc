"""Whether a graph of NNX objects is still the one that it was: the same objects in the same places.

The values of Variables do not count here. Comparing attributes by identity is several times cheaper
than describing the graph once more.
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from lifted._trees import identical
from nnx_bridge import _flax_private


class Snapshot:
    """The attributes of the nodes of a graph at one moment."""

    def __init__(self, nodes: Sequence[Any]) -> None:
        self._modules = [
            (node, _contents(node)) for node in nodes if not isinstance(node, nnx.Variable)
        ]

    def holds(self) -> bool:
        """Whether every node still has the attributes that it had."""
        return all(_same(before, _contents(node)) for node, before in self._modules)


def _contents(node: Any) -> dict[str, Any]:
    return {name: _shallow(value) for name, value in _flax_private.attributes(node).items()}


def _shallow(value: Any) -> Any:
    """A container, which may be changed in place, as a copy; anything else as it is."""
    if type(value) in (dict, list) or _holds_container(value):
        return jax.tree.map(lambda x: x, value, is_leaf=_is_node)
    return value


def _holds_container(value: Any) -> bool:
    return type(value) is tuple and any(
        type(x) in (dict, list) or _holds_container(x) for x in value
    )


def _is_node(x: Any) -> bool:
    return isinstance(x, (nnx.Pytree, nnx.Variable))


def _same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    if before.keys() != after.keys():
        return False
    return all(x is after[k] or _same_container(x, after[k]) for k, x in before.items())


def _same_container(before: Any, after: Any) -> bool:
    if type(before) is not type(after) or type(before) not in (dict, list, tuple):
        return False
    return identical(before, after, is_leaf=_is_node)

"""Graphs of NNX objects without their leaves, and copies of them.

An NNX module is a JAX pytree, which JAX takes apart and puts together several times faster than
NNX's graph mode does. So that is how it is done where the graph is a tree: where every module and
every Variable stands in one place. Where some are shared, or hold references to themselves, or are
no pytrees (``pytree=False``, array references), the graph mode does it.

The nodes of a graph are its modules and Variables. Those of a copy stand in the order of those of
the original.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from lifted._errors import Path, key_of
from nnx_bridge import _flax_private
from nnx_bridge.functional._storage import is_plain


@dataclasses.dataclass(frozen=True)
class Tree:
    """A graph in which nothing is shared."""

    treedef: Any

    def copy(self, leaves: Sequence[Any]) -> tuple[Any, list[Any]]:
        """New modules that hold the leaves themselves, and the nodes."""
        copied = self.treedef.unflatten(leaves)
        visit = _Visit()
        jax.tree.flatten(copied, is_leaf=visit.is_leaf)
        return copied, visit.nodes


@dataclasses.dataclass(frozen=True)
class Graph:
    """Any graph."""

    graphdef: Any

    def copy(self, leaves: Sequence[Any]) -> tuple[Any, list[Any]]:
        """New modules that hold the leaves themselves, and the nodes."""
        copied, nodes = _flax_private.unflatten(self.graphdef, leaves)
        return copied, _in_order(nodes)


Skeleton = Tree | Graph


def take_apart(targets: Any) -> tuple[Skeleton, list[Path], list[Any], list[Any]]:
    """The skeleton of a pytree of modules and Variables, the paths of its leaves (Variables and
    bare arrays), the leaves, and the nodes."""
    visit = _Visit()
    found, treedef = jax.tree_util.tree_flatten_with_path(targets, is_leaf=visit.is_leaf)
    leaves = [leaf for _, leaf in found]
    if visit.nothing_twice() and not any(map(_needs_graph_mode, leaves)):
        paths = [tuple(map(key_of, path)) for path, _ in found]
        return Tree(treedef), paths, leaves, visit.nodes
    graphdef, paths, leaves, indices = _flax_private.flatten(targets)
    return Graph(graphdef), paths, leaves, _in_order(_flax_private.Nodes.from_refmap(indices))


class _Visit:
    """The nodes that JAX passes on its way through a tree."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self._seen: set[int] = set()

    def is_leaf(self, x: Any) -> bool:
        """Whether JAX goes no further: at Variables, and where it has been before, as in a
        cycle."""
        kind = type(x)  # What NNX's `isinstance` says takes it several times longer.
        if issubclass(kind, nnx.Variable):
            again = True
        elif issubclass(kind, nnx.Pytree):
            again = id(x) in self._seen
        else:
            return False
        self._seen.add(id(x))
        self.nodes.append(x)
        return again

    def nothing_twice(self) -> bool:
        return len(self._seen) == len(self.nodes)


def _needs_graph_mode(leaf: Any) -> bool:
    if issubclass(type(leaf), nnx.Variable):
        return not is_plain(leaf)
    return _flax_private.is_graph_node(leaf)


def _in_order(nodes: _flax_private.Nodes) -> list[Any]:
    return [nodes[i] for i in range(len(nodes))]

"""The tree of a hosted model: where its variables are, and how they are written.

A node has an attribute for each variable of its Linen module and for each submodule. What else a
host keeps in attributes is no node and no Variable, so it is not seen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from nnx_bridge._collections import (
    Path,
    Variables,
    flatten,
    free_name,
    from_variable,
    linen_path,
    nest,
    renamed,
    set_variable,
    to_flat_state,
    to_variable,
)

OWN_ATTRIBUTES = ("_linen", "_linen_rngs")


class Node(nnx.Module):
    """One level of a hosted model: the variables of one Linen module, and its submodules."""


def fill(root: Node, variables: Variables) -> None:
    """Puts variables into an empty tree."""
    for path, variable in to_flat_state(variables):
        setattr(node_at(root, path[:-1]), _escaped(path[-1]), variable)


def nodes(node: Node, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """The nodes of the tree by the paths of their Linen modules."""
    yield path, node
    for attribute, value in vars(node).items():
        if isinstance(value, Node):
            yield from nodes(value, (*path, _unescaped(attribute)))


def items(node: Node, path: Path = ()) -> Iterator[tuple[Path, nnx.Variable[Any]]]:
    """The Variables of the tree by their paths in Linen."""
    for attribute, value in vars(node).items():
        name = _unescaped(attribute)
        if isinstance(value, nnx.Variable):
            yield linen_path((*path, name), value), value
        elif isinstance(value, Node):
            yield from items(value, (*path, name))


def read(root: Node) -> dict[str, Any]:
    """The variables of the tree, as Linen keeps them."""
    return nest((path, from_variable(variable)) for path, variable in items(root))


def write(root: Node, updates: Variables) -> None:
    """Writes updated collections into the tree, with new Variables for what is new.

    What is sown is replaced as a whole: values of an earlier call are removed.
    """
    held = dict(items(root))
    new = dict(flatten(updates))
    for path, value in new.items():
        if path in held:
            set_variable(held[path], value)
        else:
            _add(root, path, value)
    if "intermediates" in updates:
        for path in held.keys() - new.keys():
            if path[0] == "intermediates":
                _remove(node_at(root, path[1:-1]), held[path])


def _add(root: Node, path: Path, value: Any) -> None:
    collection, *modules, name = path
    node = node_at(root, tuple(modules))
    attribute = free_name(collection, name, vars(node))
    variable = to_variable(collection, value)
    setattr(node, _escaped(attribute), renamed(variable, name, attribute))


def _remove(node: Node, variable: nnx.Variable[Any]) -> None:
    delattr(node, next(name for name, value in vars(node).items() if value is variable))


def node_at(root: Node, path: Path) -> Node:
    """The node of a submodule, which is made where there is none."""
    for name in map(_escaped, path):
        if name not in vars(root):
            setattr(root, name, Node())
        root = vars(root)[name]
    return root


# Names that the attributes of hosts themselves have get one more underscore at the end.


def _is_own(name: str) -> bool:
    return name.rstrip("_") in OWN_ATTRIBUTES or name.startswith("_pytree__")


def _escaped(name: str) -> str:
    return f"{name}_" if _is_own(name) else name


def _unescaped(attribute: str) -> str:
    return attribute[:-1] if _is_own(attribute) and attribute.endswith("_") else attribute

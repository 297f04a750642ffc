"""The tree of a hosted model: where its variables are, and how they are written.

A level has an attribute for each variable of its Linen module and for each submodule. Any other
NNX module in the place of a submodule is its replacement: its Variables are variables of Linen too,
at the path of the submodule. What else a host keeps in attributes is not seen here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from flax import nnx

from nnx_bridge import _flax_private
from nnx_bridge._collections import (
    Path,
    Variables,
    enter,
    flatten,
    linen_entry,
    renamed,
    set_variable,
    to_flat_state,
    to_variable,
)
from nnx_bridge._names import (
    OWN_ATTRIBUTES,
    attribute_name,
    free_attribute,
    linen_name,
    linen_names,
)
from nnx_bridge.host._program import Place

Items = list[tuple[Path, nnx.Variable[Any]]]


class Level(nnx.Module):
    """One level of a hosted model: the variables of one Linen module, and its submodules."""

    _linen: Place

    def _new_level(self, name: str) -> Level:
        """A new level for the submodule of this name."""
        raise NotImplementedError


@dataclasses.dataclass
class Contents:
    """What stands in a tree.

    Attributes:
      variables: the Variables by their paths in Linen, `(collection, *modules, name)`.
      tree: their values, as Linen keeps them.
      replacements: the NNX modules that replace submodules, by the paths of these.
      modes: whether nodes are in training, by their paths, where that was said.
    """

    variables: Items = dataclasses.field(default_factory=list)
    tree: dict[str, Any] = dataclasses.field(default_factory=dict)
    replacements: dict[Path, nnx.Module] = dataclasses.field(default_factory=dict)
    modes: dict[Path, bool] = dataclasses.field(default_factory=dict)
    _collections: dict[Any, str] = dataclasses.field(default_factory=dict)

    def add(self, modules: Path, attribute: str, variable: nnx.Variable[Any]) -> None:
        """Adds the Variable that stands in an attribute of the module at the path ``modules``."""
        place, value = linen_entry(modules, attribute, variable, self._collections)
        self.variables.append((place, variable))
        enter(self.tree, place, value)


def slots(node: nnx.Module) -> dict[str, Any]:
    """The attributes of a module, without what looking them up does besides."""
    attributes: dict[str, Any] = object.__getattribute__(node, "__dict__")
    return attributes


def put(node: Level, attribute: str, value: Any) -> None:
    """Sets an attribute, which need not be known yet."""
    nnx.Module.__setattr__(node, attribute, value)


def contents(root: nnx.Module) -> Contents:
    """What stands in the tree of ``root``, or in a replacement, by paths that begin there."""
    found = Contents()
    if Level in type(root).__mro__:
        _collect(root, (), found)
    else:
        found.replacements[()] = root
    for path, module in found.replacements.items():
        _, paths, leaves, _ = _flax_private.flatten(module)
        for inner, leaf in zip(paths, leaves, strict=True):
            # What it records is no variable of the model.
            if isinstance(leaf, nnx.Variable) and not _flax_private.is_captured(inner):
                *modules, attribute = map(str, inner)
                found.add((*path, *linen_names(modules)), attribute, leaf)
    return found


def _collect(node: nnx.Module, path: Path, found: Contents) -> None:
    attributes = slots(node)
    place: Place = attributes["_linen"]
    training = attributes.get("_linen_mode")
    if training is not None:
        found.modes[path] = training
    for attribute, value in attributes.items():
        if attribute in _NO_PARTS:
            continue
        # By the classes, since `isinstance` takes as long as reading the Variable.
        kinds = type(value).__mro__
        if nnx.Variable in kinds:
            found.add(path, attribute, value)
        elif nnx.Module in kinds:
            name = linen_name(attribute)
            if _is_part(value, place, name):
                _collect(value, (*path, name), found)
            else:
                found.replacements[(*path, name)] = value


def _is_part(value: nnx.Module, place: Place, name: str) -> bool:
    """Whether a module is the level of the submodule ``name`` of the module at ``place``."""
    if Level not in type(value).__mro__:
        return False
    own: Place = slots(value)["_linen"]
    same = own.program is place.program or own.program == place.program
    return same and own.path == (*place.path, name)


def nodes(node: nnx.Module, path: Path = ()) -> Iterator[tuple[Path, nnx.Module]]:
    """The modules of the tree by their paths in Linen, those inside of replacements included."""
    if not isinstance(node, Level):
        for inner, module in nnx.iter_modules(node, graph=True):
            yield (*path, *linen_names(map(str, inner))), module
        return
    yield path, node
    for attribute, value in slots(node).items():
        if isinstance(value, nnx.Module) and attribute not in OWN_ATTRIBUTES:
            name = linen_name(attribute)
            if _is_part(value, slots(node)["_linen"], name):
                yield from nodes(value, (*path, name))
            else:
                for inner, module in nnx.iter_modules(value, graph=True):
                    yield (*path, name, *linen_names(map(str, inner))), module


def fill(root: Level, variables: Variables) -> None:
    """Puts variables into an empty tree."""
    for path, variable in to_flat_state(variables):
        put(node_at(root, linen_names(path[:-1])), path[-1], variable)


def write(root: nnx.Module, found: Contents, before: Variables, updates: Variables) -> None:
    """Writes updated collections into the tree, with new Variables for what is new.

    What is sown is replaced as a whole: values of an earlier call are removed.

    Args:
      root: the tree.
      found: its contents before the call.
      before: the variables that the call was given; what it left alone is not written, since a
        Variable may stand at several paths.
      updates: what the call returned.
    """
    held = dict(found.variables)
    given = dict(flatten({c: tree for c, tree in before.items() if c in updates}))
    new = dict(flatten(updates))
    for path, value in new.items():
        if path not in held:
            assert isinstance(root, Level)  # A replacement makes no new variables.
            _add(root, path, value)
        elif value is not given.get(path):
            set_variable(held[path], value)
    if "intermediates" in updates:
        for path in held.keys() - new.keys():
            if path[0] == "intermediates" and isinstance(root, Level):
                _remove(node_at(root, path[1:-1]), held[path])


def _add(root: Level, path: Path, value: Any) -> None:
    collection, *modules, name = path
    node = node_at(root, tuple(modules))
    attribute = free_attribute(collection, name, slots(node))
    put(node, attribute, renamed(to_variable(collection, value), name, attribute))


def _remove(node: Level, variable: nnx.Variable[Any]) -> None:
    delattr(node, next(name for name, value in slots(node).items() if value is variable))


def find(root: nnx.Module, path: Path) -> nnx.Module | None:
    """The level of a submodule, or its replacement; None where there is none."""
    for name in path:
        child = slots(root).get(attribute_name(name)) if isinstance(root, Level) else None
        if not isinstance(child, nnx.Module):
            return None
        root = child
    return root


def node_at(root: Level, path: Path) -> Level:
    """The level of a submodule, which is made where there is none."""
    for name in path:
        attribute = attribute_name(name)
        if attribute not in slots(root):
            put(root, attribute, root._new_level(name))
        root = slots(root)[attribute]
    return root


# With the attributes in which NNX keeps its own books: those that are no parts of a level.
_NO_PARTS = {*OWN_ATTRIBUTES, *vars(nnx.Module())}

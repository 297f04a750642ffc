"""Linen collections as NNX state, and back.

Linen keeps values in nested dicts under the name of a collection: `{'params': {'Dense_0':
{'kernel': ...}}}`. NNX keeps each value in a Variable whose type says what it is, at the path of
the module alone. This module is the one place that knows how the two correspond:

- a collection's name and a Variable type name each other in Flax's registry, in which users may
  enter their own pairs (`nnx.register_variable_name`);
- a metadata box (`nn.Partitioned`, or any `AxisMetadata`) becomes metadata of the Variable;
- a name that NNX modules need themselves gets an underscore (`_names.py`);
- of equal names in two collections of one module, one keeps the name and the others get their
  collection's name in front (`ema_w`), the Linen name staying in the metadata.

A dict without any value in it (`{'params': {}}`) stands for nothing and does not come back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from flax.core import meta

from lifted._errors import describe
from lifted._nested import flat
from lifted._trees import identical
from nnx_bridge._names import (
    OWN_ATTRIBUTES,
    attribute_name,
    free_attribute,
    linen_name,
    linen_names,
)
from nnx_bridge._variable_types import collection_name, variable_type

Variables = Mapping[str, Any]
Path = tuple[Any, ...]  # Strings, and the integers of NNX lists.

# What Linen calls a module that nobody has named: `Dense_0`.
_OF_A_MODULE = re.compile(r"[A-Z]\w*_\d+")

# Metadata by which a Variable remembers what it was in Linen.
BOX = "linen_box"
_NAME = "linen_name"


def to_variable(collection: str, value: Any) -> nnx.Variable[Any]:
    """One value of a Linen collection, boxed or not, as a Variable.

    Args:
      collection: The collection's name.
      value: An array, any other pytree, or a metadata box around one.

    Returns:
      A Variable of the type of the collection. It never asks for a mesh: values stay where they
      are, the names of a `nn.Partitioned` become `out_sharding`.

    Raises:
      ValueError: `value` is an `nnx.bridge.NNXMeta` made for another Variable type.

    Example:
        >>> to_variable("params", nn.Partitioned(jax.numpy.ones(3), ("model",))).out_sharding
        ('model',)
    """
    kind = variable_type(collection)
    if isinstance(value, nnx.bridge.NNXMeta):
        if value.var_type is not kind:
            raise ValueError(
                f"a value of the collection {collection!r} is boxed for the Variable type "
                f"{value.var_type.__name__}, but {collection!r} stands for {kind.__name__}; move "
                f"it to {collection_name(value.var_type)!r}"
            )
        standard = nnx.Variable.required_metadata
        metadata = {key: v for key, v in value.metadata.items() if key not in standard}
        return kind(value.value, **metadata, eager_sharding=False)
    if not isinstance(value, meta.AxisMetadata):
        return kind(value)
    leaves, box = jax.tree.flatten(value)
    if len(leaves) != 1:
        # What the box holds besides its one value would have to be metadata, which must not hold
        # arrays: such a box is kept whole.
        return kind(value)
    metadata = {BOX: box}
    if isinstance(value, nn.Partitioned):
        metadata["out_sharding"] = value.names
    return kind(leaves[0], **metadata, eager_sharding=False)


def from_variable(variable: nnx.Variable[Any]) -> Any:
    """The value of a Variable as Linen keeps it, the inverse of `to_variable`.

    Returns:
      The value; in the box it came in; or, for other metadata, in an `nnx.bridge.NNXMeta`.

    Example:
        >>> from_variable(nnx.Param(1.0)), from_variable(nnx.Param(1.0, unit="m")).metadata
        (1.0, {'unit': 'm'})
    """
    return _boxed(variable, variable.get_metadata())


def _boxed(variable: nnx.Variable[Any], metadata: dict[str, Any]) -> Any:
    """The value of a Variable with this metadata, in its box; the metadata is used up."""
    raw = variable.get_raw_value()
    # Reading an array that no hook changes needs no copy of it.
    plain = isinstance(raw, jax.Array) and "on_get_value" not in metadata
    value = raw if plain else variable.get_value()
    for key in (*nnx.Variable.required_metadata, _NAME):
        metadata.pop(key, None)
    if not metadata:
        return value
    if BOX not in metadata:
        return nnx.bridge.NNXMeta(type(variable), value, metadata)
    box = jax.tree.unflatten(metadata[BOX], [value])
    names = metadata.get("out_sharding")
    if isinstance(box, nn.Partitioned) and names is not None and box.names != names:
        # NNX's transforms have added or removed an axis since the box was opened.
        return box.replace(names=tuple(names))
    return box


def with_box(variable: nnx.Variable[Any], change: Callable[[Any], Any]) -> nnx.Variable[Any]:
    """The Variable, which remembers its box as ``change`` makes it of that; in place."""
    box = jax.tree.unflatten(variable.get_metadata(BOX), [variable.get_raw_value()])
    variable.set_metadata(BOX, jax.tree.structure(change(box)))
    return variable


def set_variable(variable: nnx.Variable[Any], value: Any) -> None:
    """Writes a value as Linen keeps it, boxed or not, into a Variable that exists."""
    held = variable.get_value()
    if isinstance(value, meta.AxisMetadata) and not isinstance(held, meta.AxisMetadata):
        (value,) = jax.tree.leaves(value)
    if not identical(value, held):
        # What was not changed may belong to another trace, where it must not be written.
        variable.set_value(value)


def linen_path(path: Path, variable: nnx.Variable[Any]) -> Path:
    """Where Linen keeps a Variable: `(collection, *modules, name)`.

    Example:
        >>> linen_path(("Dense_0", "kernel"), nnx.Param(1.0))
        ('params', 'Dense_0', 'kernel')
        >>> linen_path(("train_", "kernel"), nnx.Param(1.0))
        ('params', 'train', 'kernel')
    """
    name = variable.get_metadata(_NAME, linen_name(path[-1]))
    return (collection_name(type(variable)), *linen_names(path[:-1]), name)


def linen_entry(
    modules: Path, attribute: Any, variable: nnx.Variable[Any], names: dict[Any, str]
) -> tuple[Path, Any]:
    """`linen_path` and `from_variable` in one, for reading many Variables.

    Args:
      modules: the path of the Linen module.
      attribute: where the Variable stands in it.
      variable: the Variable.
      names: collections of Variable types that are known already; others are added.
    """
    kind = type(variable)
    collection = names.get(kind)
    if collection is None:
        collection = names[kind] = collection_name(kind)
    metadata = variable.get_metadata()
    raw = variable.get_raw_value()
    if metadata.keys() <= nnx.Variable.required_metadata and isinstance(raw, jax.Array):
        return (collection, *modules, linen_name(attribute)), raw  # As most Variables are.
    name = metadata.get(_NAME, linen_name(attribute))
    return (collection, *modules, name), _boxed(variable, metadata)


def to_state(variables: Variables) -> nnx.State:
    """Linen variables as an NNX state.

    Args:
      variables: Nested dicts (frozen or not) by collection, as `module.init` returns them.

    Returns:
      A state with one Variable for each value, at the path of its module and its name. A name that
      NNX modules need themselves (`train`, `eval`, `sow`, ...) gets an underscore at its end.

    Raises:
      TypeError: `variables` is not nested by collection.
      ValueError: A collection has the name that Linen gives to a module; or see `to_variable`.

    Example:
        >>> state = to_state({"params": {"w": 1.0}, "ema": {"w": 2.0}})
        >>> state["w"].get_value(), state["ema_w"].get_value()
        (1.0, 2.0)
        >>> to_variables(state)
        {'ema': {'w': 2.0}, 'params': {'w': 1.0}}
    """
    for name in variables:
        if _OF_A_MODULE.fullmatch(str(name)):
            raise ValueError(
                f"variables: {name!r} is the name of a module, not of a collection; parameters "
                "alone are written {'params': parameters}"
            )
    return nnx.from_flat_state(list(to_flat_state(variables)))


def to_flat_state(variables: Variables) -> Iterator[tuple[Path, nnx.Variable[Any]]]:
    """The Variables of `to_state` with their paths."""
    by_module: dict[Path, list[tuple[str, str, Any]]] = {}
    for (collection, *modules, name), value in flatten(variables):
        by_module.setdefault(_attributes(collection, modules), []).append((collection, name, value))
    submodules: dict[Path, set[str]] = {}
    for path in by_module:
        for depth, name in enumerate(path):
            submodules.setdefault(path[:depth], set()).add(name)
    for path, entries in by_module.items():
        taken = submodules.get(path, set())
        # Parameters keep their names, whichever other collections there are.
        for collection, name, value in sorted(entries, key=lambda e: (e[0] != "params", e[:2])):
            attribute = free_attribute(collection, name, taken)
            taken.add(attribute)
            yield (*path, attribute), renamed(to_variable(collection, value), name, attribute)


def _attributes(collection: str, modules: list[str]) -> Path:
    """The attributes of nested modules."""
    if modules and modules[0] in OWN_ATTRIBUTES:
        if issubclass(variable_type(collection), nnx.RngState):
            # No module of Linen, which has no such collections, but the streams of a host.
            return tuple(modules)
    return tuple(map(attribute_name, modules))


def to_variables(state: nnx.State) -> dict[str, Any]:
    """An NNX state as Linen variables, the inverse of `to_state`.

    Args:
      state: The state of a module, as `nnx.state` gives it, or a part of it.

    Returns:
      Nested dicts by collection. Names are those of Linen, also of the state of a `Host` in which
      some are changed; metadata boxes are back.

    Raises:
      TypeError: `state` is no state.
      ValueError: A Variable's type cannot be given a collection (see `collection_name`), or two
        Variables have the same path in Linen.

    Example:
        >>> to_variables(nnx.State({"norm": {"scale": nnx.Param(1.0), "mean": nnx.BatchStat(0.0)}}))
        {'batch_stats': {'norm': {'mean': 0.0}}, 'params': {'norm': {'scale': 1.0}}}
    """
    if not isinstance(state, nnx.State):
        raise TypeError(
            f"state: expected an nnx.State, as nnx.state(module) gives it; got {describe(state)}"
        )
    return nest(
        (linen_path(path, variable), from_variable(variable))
        for path, variable in nnx.to_flat_state(state)
    )


def nest(values: Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    """Nested dicts of values given by their paths."""
    tree: dict[str, Any] = {}
    for path, value in values:
        enter(tree, path, value)
    return tree


def enter(tree: dict[str, Any], path: Path, value: Any) -> None:
    """Adds a value to nested dicts.

    Raises:
      ValueError: There is one at this path.
    """
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    if path[-1] in tree:
        where = "/".join(map(str, path))
        raise ValueError(f"two variables have the Linen path {where!r}")
    tree[path[-1]] = value


def flatten(variables: Variables) -> Iterator[tuple[Path, Any]]:
    """The values of nested dicts with their paths `(collection, *modules, name)`.

    Raises:
      TypeError: A collection is not a dict.
    """
    for collection, tree in variables.items():
        if not isinstance(tree, Mapping):
            raise TypeError(
                "variables must be nested dicts by collection, such as {'params': {...}}; got "
                f"{type(tree).__name__} at {collection!r}; a dict of parameters alone is "
                "written {'params': parameters}"
            )
        yield from flat(tree, (collection,))


def renamed(variable: nnx.Variable[Any], name: str, attribute: str) -> nnx.Variable[Any]:
    """The variable, which remembers its Linen name where its attribute has another."""
    if linen_name(attribute) != name:
        variable.set_metadata(_NAME, name)
    return variable

"""What each side has: the arrays of Linen variables and of an NNX model, without their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import meta

from lifted._errors import describe, dtype_of
from nnx_bridge._collections import (
    Path,
    Variables,
    flatten,
    linen_path,
)
from nnx_bridge._variable_types import collection_name, variable_type
from nnx_bridge.weights._arrays import holds_array
from nnx_bridge.weights._layouts import Names

# What a model records or draws from, but does not know: it is not required from Linen, nor taken.
NOT_WEIGHTS = ("intermediates", "perturbations")
# What an NNX model may have where Linen's variables have nothing of the kind.
OPTIONAL = ("cache",)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of one side.

    Attributes:
      path: In Linen `(collection, *modules, name)`; in NNX that of `nnx.to_flat_state`.
      shape: Its shape; None for what is no array.
      dtype: Its dtype; for what is no array, its type.
      names: The names of its axes, where it has some.
      collection: The Linen collection that it belongs to.
      box: In Linen, the metadata box that it is kept in, without the value.
    """

    path: Path
    shape: tuple[int, ...] | None
    dtype: str
    names: Names = None
    collection: str = "params"
    box: Any = dataclasses.field(default=None, repr=False)

    @property
    def abstract(self) -> Any:
        """Shape and dtype, as JAX wants them."""
        return jax.ShapeDtypeStruct(self.shape or (), self.dtype)

    def __str__(self) -> str:
        if self.shape is None:
            return self.dtype
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Target(Leaf):
    """One array of an NNX model, and what is known of it from the model alone.

    Attributes:
      linen_name: What Linen calls it, where the model remembers.
      required: Whether it must be filled.
    """

    linen_name: Any = None
    required: bool = True


def linen_values(variables: Variables) -> Iterator[tuple[Path, Any]]:
    """The values of Linen variables by path, boxed as they are, without what is no weight.

    Raises:
      TypeError: They are not nested by collection.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(
            "variables must be nested dicts by collection, as module.init returns them; got "
            f"{describe(variables)}"
        )
    weights = {c: tree for c, tree in variables.items() if c not in NOT_WEIGHTS}
    yield from flatten(weights)


def linen_leaves(variables: Variables) -> list[Leaf]:
    """The leaves of Linen variables.

    Raises:
      TypeError: They are not nested by collection.
    """
    return [_linen_leaf(path, value) for path, value in linen_values(variables)]


def _linen_leaf(path: Path, value: Any) -> Leaf:
    value, box, names = unboxed(value)
    shape, dtype = _description(value)
    return Leaf(path, shape, dtype, names, path[0], box)


def unboxed(value: Any) -> tuple[Any, Any, Names]:
    """A value without its metadata box, the box, and the names of the axes in it.

    A box with other than one array in it is taken for a value.
    """
    if not isinstance(value, meta.AxisMetadata):
        return value, None, None
    leaves, box = jax.tree.flatten(value)
    if len(leaves) != 1:
        return value, None, None
    names = value.names if isinstance(value, nn.Partitioned) else None
    if isinstance(value, nnx.bridge.NNXMeta):
        names = value.metadata.get("out_sharding")
    return leaves[0], box, None if names is None else tuple(names)


def _description(value: Any) -> tuple[tuple[int, ...] | None, str]:
    if not holds_array(value):
        return None, describe(value)
    return tuple(np.shape(value)), str(dtype_of(value))


def nnx_leaves(model: Any, collections: Collection[str] = ()) -> tuple[list[Target], list[Path]]:
    """The leaves of an NNX model, or of its state, and the paths of what is no weight.

    A Variable that is at several paths has the first of them. One whose type is derived from that
    of one of Linen's `collections`, and has no collection of its own there, belongs to that one.
    """
    found, ignored = [], []
    for path, leaf in flat_state(model):
        if not isinstance(leaf, nnx.Variable):
            # Such as the scales of `nnx.WeightNorm` before flax 0.12.12; most are constants.
            shape, dtype = _description(leaf)
            found.append(Target(path, shape, dtype, required=False))
        elif isinstance(leaf, nnx.RngState) or collection_name(type(leaf)) in NOT_WEIGHTS:
            ignored.append(path)
        else:
            own, *_, name = linen_path(path, leaf)
            derived = [c for c in collections if isinstance(leaf, variable_type(c))]
            collection = own if own in collections or not derived else derived[0]
            shape, dtype = _description(leaf.get_value())
            names = leaf.get_metadata("out_sharding", None)
            names = None if names is None else tuple(names)
            found.append(Target(path, shape, dtype, names, collection, linen_name=name))
    return found, ignored


def flat_state(model: Any) -> list[tuple[Path, Any]]:
    """The Variables and bare arrays of a model, or of its state, by path."""
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    return list(nnx.to_flat_state(state))


def module_classes(model: Any) -> dict[Path, type]:
    """The classes of the modules of a model by path; empty for a state."""
    if isinstance(model, nnx.State):
        return {}
    return {
        path: type(node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module) and not isinstance(node, nnx.List | nnx.Dict)
    }


def nnx_values(tree: Any) -> dict[Path, Any]:
    """The values of an NNX module, of a state, or of nested dicts, by path."""
    if isinstance(tree, nnx.Module | nnx.State):
        flat = flat_state(tree)
    elif isinstance(tree, Mapping):
        flat = [(path[1:], value) for path, value in flatten({"": tree})]
    else:
        raise TypeError(f"expected an NNX module, a state or nested dicts, got {describe(tree)}")
    return {
        path: value.get_value() if isinstance(value, nnx.Variable) else value
        for path, value in flat
    }

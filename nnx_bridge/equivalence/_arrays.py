"""Arrays by their paths: what arguments, outputs and variables are to a comparison."""

from __future__ import annotations

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from nnx_bridge._values import Keys, leaves

Arrays = dict[str, Any]


def by_path(tree: Any) -> Arrays:
    """The arrays of a pytree, out of their boxes, by their paths."""
    found = {text(keys): nn.meta.unbox(leaf) for keys, leaf in leaves(tree, _is_box)}
    return {path: x for path, x in found.items() if isinstance(x, jax.Array | np.ndarray)}


def of_outputs(tree: Any) -> tuple[Arrays, set[str]]:
    """What is compared of the outputs of a model, by their paths, and words for the rest.

    Numbers of Python are arrays without axes. Texts and members of an enumeration are arrays of
    their bytes, since arrays are what a compiled program returns: they agree if they are equal.
    """
    found, others = {}, set()
    for keys, leaf in leaves(tree, _is_box):
        path, x = text(keys), nn.meta.unbox(leaf)
        if isinstance(x, jax.Array | np.ndarray):
            found[path] = x
        elif isinstance(x, bool | int | float | complex):
            found[path] = np.asarray(x, jnp.result_type(x))
        elif isinstance(x, str | bytes | enum.Enum):
            found[f"{path} (text)"] = np.frombuffer(_words(x), np.uint8)
        else:
            others.add(
                f"output {path}, a {type(x).__name__}: only arrays, numbers and texts are compared"
            )
    return found, others


def with_values(tree: Any, values: Arrays) -> Any:
    """The pytree with other arrays in it, given as `by_path` gives them."""
    paths = [text(path) for path, _ in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(tree))]
    leaves, treedef = jax.tree.flatten(tree)
    structure: Any = treedef
    return structure.unflatten([values.get(p, x) for p, x in zip(paths, leaves, strict=True)])


def inexact(arrays: Arrays) -> Arrays:
    """The arrays that can be differentiated."""
    return {path: x for path, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact)}


def text(path: Keys) -> str:
    """A path as reports show it."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "result"


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.meta.AxisMetadata)


def _words(x: str | bytes | enum.Enum) -> bytes:
    return x if isinstance(x, bytes) else str(x).encode()

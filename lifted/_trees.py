"""Small questions about pytrees."""

from collections.abc import Callable
from typing import Any

import jax


def structure(tree: Any) -> Any:
    """The structure of a pytree."""
    return jax.tree.structure(tree)


def identical(a: Any, b: Any, is_leaf: Callable[[Any], bool] | None = None) -> bool:
    """Whether two pytrees have one structure and the same objects as leaves."""
    leaves, treedef = jax.tree.flatten(a, is_leaf=is_leaf)
    others, other_treedef = jax.tree.flatten(b, is_leaf=is_leaf)
    same: bool = treedef == other_treedef  # type: ignore[operator]
    return same and all(x is y for x, y in zip(leaves, others, strict=True))


@jax.tree_util.register_static
class Static:
    """A value that JAX carries along without looking at it; equal where the values are equal."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(Static)

"""Small questions about pytrees."""

from typing import Any

import jax


def structure(tree: Any) -> Any:
    """The structure of a pytree."""
    return jax.tree.structure(tree)


def identical(a: Any, b: Any) -> bool:
    """Whether two pytrees have one structure and the same objects as leaves."""
    if structure(a) != structure(b):
        return False
    return all(x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@jax.tree_util.register_static
class Static:
    """A value that JAX carries along without looking at it; equal where the values are equal."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(Static)

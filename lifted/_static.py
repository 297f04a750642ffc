"""A Python value in the structure of a pytree."""

from typing import Any

import jax


@jax.tree_util.register_static
class Static:
    """A value that JAX carries along without looking at it; equal where the values are equal."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(Static)

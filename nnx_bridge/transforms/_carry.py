"""What goes from step to step keeps its structure, shapes and dtypes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from lifted._errors import describe
from lifted._trees import structure

_REMEDY = "Convert what is returned, such as with .astype, or start with what the steps return."


class Carries:
    """The user's carry as it came into the last step and left it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._last: tuple[Any, Any] | None = None

    def note(self, before: Any, after: Any) -> None:
        """Remembers types only: the arrays belong to the step."""
        self._last = jax.tree.map(describe, before), jax.tree.map(describe, after)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Says which part of the carry has changed, where JAX names a place among arrays of ours.

        Raises:
          TypeError: some part has changed.
        """
        try:
            yield
        except TypeError as error:
            message = self._difference()
            if message is None:
                raise
            raise TypeError(message) from error

    def _difference(self) -> str | None:
        if self._last is None:
            return None
        before, after = self._last
        expected, found = structure(before), structure(after)
        if expected != found:
            return (
                f"{self._name}: the carry comes into a step with the structure {expected} and "
                f"leaves it with {found}; it must keep it."
            )
        leaves = jax.tree_util.tree_leaves_with_path(before)
        for (path, old), new in zip(leaves, jax.tree.leaves(after), strict=True):
            if old != new:
                return (
                    f"{self._name}: carry{jax.tree_util.keystr(path)} comes into a step as {old} "
                    f"and leaves it as {new}; it must keep its shape and dtype. {_REMEDY}"
                )
        return None

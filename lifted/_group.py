"""Kinds of targets: what a package must provide so that the transforms accept its modules.

Each kind has a `Group` class that functionalises all targets of its kind in one call, so that what
they share is found. Kinds register with `register_group`; those of other packages are found through
the entry points ``lifted.groups`` the first time that a target of unknown type is seen. This
package knows Linen only.
"""

import contextlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from lifted._errors import Path

Variables = Any
Updates = Any
Filter = Any


class Group(Protocol):
    """All targets of one kind in one call. ``variables`` are lists with one pytree for each
    target."""

    variables: list[Variables]
    initializing: bool

    def __init__(
        self, targets: Sequence[Any], *, variables: Filter, frozen: Filter, rngs: Filter
    ) -> None:
        """Reads the targets, writes nothing.

        Args:
          targets: the targets, bound.
          variables: filter of the variables that are visible and may be updated.
          frozen: filter of further variables that are visible but may not be updated.
          rngs: filter of the RNG streams that are visible.
        """

    def opened(
        self, variables: list[Variables]
    ) -> contextlib.AbstractContextManager[tuple[list[Any], Callable[[], Updates]]]:
        """A context with copies of the targets that hold ``variables``, and a function that tells
        what was written to them. Neither outlives it."""

    def publish(self, updates: Updates) -> None:
        """Writes ``updates`` to the targets."""

    def outside(self) -> dict[Path, Any]:
        """All that the caller's modules hold and a function could write past the copies that it is
        given: value by path."""

    def restore(self, outside: dict[Path, Any]) -> None:
        """Brings what `outside` describes back into that state."""

    def match(self, variables: list[Variables], filter: Filter) -> list[Variables]:
        """``variables`` with True at the leaves that ``filter`` selects and False at the others."""

    def prune(self, tree: list[Variables], mask: list[Variables]) -> list[Variables]:
        """``tree`` without the variables that ``mask`` has as False throughout."""

    def extend(
        self, variables: list[Variables], updates: Updates, filter: Filter
    ) -> list[Variables] | None:
        """``variables`` with those that ``updates`` created and ``filter`` selects; None where
        there are none."""

    def written(self, updates: Updates) -> list[Variables]:
        """The variables among ``updates``, to differentiate them."""

    @staticmethod
    def visible_for(tangents: Any) -> Filter:
        """A filter of the variables that have to be visible for one target's tangents, in any form
        that the user may choose."""

    @staticmethod
    def as_variables(tangents: Sequence[Any], variables: Sequence[Variables]) -> list[Any]:
        """Tangents of ``variables``, given in any form that the user may choose, in the form of
        ``variables``."""

    def per_scope(self, tree: list[Variables]) -> list[Variables]:
        """``tree`` as one tree for each scope, as Linen's ``multi_scope`` has it."""

    def names(self, variables: list[Variables]) -> list[str]:
        """What a filter can name, for messages."""


_groups: list[tuple[Callable[[Any], bool], type[Group]]] = []
_are_values: list[Callable[[Any], bool]] = []
_entry_points_loaded = False
# No targets, which need not be asked of each kind; much of what a pytree is made of.
_CONTAINERS = {tuple, list, dict, type(None)}


def register_group(
    is_target: Callable[[Any], bool],
    group: type[Group],
    is_value: Callable[[Any], bool] = lambda x: False,
) -> None:
    """Makes the objects for which ``is_target`` holds targets that ``group`` functionalises.

    Pytrees for which ``is_value`` holds are values, like arrays, though they may hold targets or be
    ones: functions return them, and gradients are such.
    """
    _groups.append((is_target, group))
    _are_values.append(is_value)


def group_of(x: Any) -> type[Group] | None:
    """The class that functionalises ``x``, None where ``x`` is no target."""
    if type(x) in _CONTAINERS:
        return None
    for is_target, group in _groups:
        if is_target(x):
            return group
    return None


def load_entry_points() -> None:
    """Registers the kinds that other installed packages provide; once."""
    global _entry_points_loaded
    if not _entry_points_loaded:
        _entry_points_loaded = True
        for entry_point in importlib.metadata.entry_points(group="lifted.groups"):
            entry_point.load()


def is_target(x: Any) -> bool:
    """Whether ``x`` is a module or a scope of a known kind."""
    return group_of(x) is not None


def is_value(x: Any) -> bool:
    """Whether ``x`` is a value of a kind of its own, such as an `nnx.State`."""
    return type(x) not in _CONTAINERS and any(is_value(x) for is_value in _are_values)


def leaves(tree: Any) -> list[Any]:
    """The arrays, targets and values in ``tree``."""
    return jax.tree.leaves(tree, is_leaf=lambda x: is_target(x) or is_value(x))

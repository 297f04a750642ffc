"""The variables of a node for one call: read before, written after."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from flax import nnx
from flax.core.scope import CollectionFilter, in_filter, union_filters

from nnx_bridge._collections import Path, Variables
from nnx_bridge.host._captures import deposit, recorded
from nnx_bridge.host._marks import COLLECTION, places
from nnx_bridge.host._replacement import Replacement
from nnx_bridge.host._tree import Contents, contents, write


class Frame:
    """The variables of one node for one call."""

    def __init__(self, node: nnx.Module, path: Path) -> None:
        self._node = node
        self._path = path
        self._contents: Contents = contents(node)
        self._captured = recorded(node)
        self.called: list[Path] = []
        variables = self._contents.read()
        # Sown values are a record of one call, so they are no input of the next.
        variables.pop("intermediates", None)
        self.variables: dict[str, Any] = {**variables, **self._captured}
        self.places: dict[str, Any] = {}

    @property
    def records(self) -> bool:
        """Whether a context around the call records what is sown."""
        return bool(self._captured)

    @property
    def replacements(self) -> dict[Path, Replacement]:
        """The replacements, by their paths in the model."""
        found = self._contents.replacements
        return {(*self._path, *p): Replacement((*self._path, *p), m) for p, m in found.items()}

    @property
    def modes(self) -> dict[Path, bool]:
        """Whether nodes are in training, where that was said, by their paths in the model."""
        return {(*self._path, *path): mode for path, mode in self._contents.modes.items()}

    def mutable(self, changeable: CollectionFilter) -> CollectionFilter:
        """The filter with which Linen is called."""
        return union_filters(changeable, list(self._captured)) if self._captured else changeable

    def mark(self, marks: Mapping[Path, Hashable]) -> None:
        """Marks the modules at these paths of the model, by the collection `places`."""
        depth = len(self._path)
        self.places = places(
            {path[depth:]: mark for path, mark in marks.items() if path[:depth] == self._path}
        )

    @property
    def modules(self) -> set[Path]:
        """The paths in the model of all that may be a module."""
        paths = {path[1:] for path, _ in self._contents.variables}
        return {(*self._path, *p[:depth]) for p in paths for depth in range(len(p))}

    def keep(self, updates: Variables, changeable: CollectionFilter) -> None:
        """Writes what a call changed."""
        updates = {c: values for c, values in updates.items() if c != COLLECTION}
        sown = {c: updates.pop(c) for c in self._captured if c in updates}
        depth = len(self._path)
        below = [path[depth:] for path in self.called if path[:depth] == self._path]
        if sown:
            deposit(self._node, sown, below)
        if in_filter(changeable, "intermediates") and "intermediates" not in self._captured:
            updates = {"intermediates": {}, **updates}
        write(self._node, self._contents, self.variables, updates)

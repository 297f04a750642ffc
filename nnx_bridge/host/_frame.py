"""The variables of a node for one call: read before, written after."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from flax import nnx
from flax.core.scope import CollectionFilter, in_filter, union_filters

from nnx_bridge._collections import Path, Variables
from nnx_bridge.host._captures import deposit, recorded
from nnx_bridge.host._marks import COLLECTION, places
from nnx_bridge.host._program import Program
from nnx_bridge.host._replacement import Replacement
from nnx_bridge.host._tree import Contents, contents, write


class Frame:
    """The variables of one node for one call.

    Attributes:
      path: that of the node in the model.
      variables: the variables, as Linen keeps them.
      places: what marks modules, as a collection.
      called: the paths in the model of the Linen modules whose methods have run.
      replacements: the replacements, by their paths in the model.
      modes: whether nodes are in training, where that was said, by their paths in the model.
    """

    def __init__(self, node: nnx.Module, path: Path, program: Program) -> None:
        self._node = node
        self.path = path
        self._contents: Contents = contents(node)
        self._captured = recorded(node)
        self.called: list[Path] = []
        variables = self._contents.tree
        # Sown values are a record of one call, so they are no input of the next.
        variables.pop("intermediates", None)
        variables.update(self._captured)
        self.variables = variables
        self.places: dict[str, Any] = {}
        replaced = self._in_model(self._contents.replacements)
        self.replacements = {p: Replacement(p, m, program) for p, m in replaced.items()}
        self.modes: dict[Path, bool] = self._in_model(self._contents.modes)

    def _in_model(self, values: dict[Path, Any]) -> dict[Path, Any]:
        """Values by their paths in the model."""
        return {(*self.path, *path): x for path, x in values.items()} if self.path else values

    @property
    def records(self) -> bool:
        """Whether a context around the call records what is sown."""
        return bool(self._captured)

    def mutable(self, changeable: CollectionFilter) -> CollectionFilter:
        """The filter with which Linen is called."""
        return union_filters(changeable, list(self._captured)) if self._captured else changeable

    def mark(self, marks: Mapping[Path, Hashable]) -> None:
        """Marks the modules at these paths of the model, by the collection `places`."""
        self.places = places(self.below(marks))

    def below(self, marks: Mapping[Path, Hashable]) -> dict[Path, Hashable]:
        """Marks of the model that are for the node and below, by their paths from there."""
        depth = len(self.path)
        return {path[depth:]: mark for path, mark in marks.items() if path[:depth] == self.path}

    @property
    def modules(self) -> set[Path]:
        """The paths in the model of all that may be a module."""
        paths = {path[1:] for path, _ in self._contents.variables}
        return {(*self.path, *p[:depth]) for p in paths for depth in range(len(p))}

    def keep(self, updates: Variables, changeable: CollectionFilter) -> None:
        """Writes what a call changed."""
        updates = {c: values for c, values in updates.items() if c != COLLECTION}
        sown = {c: updates.pop(c) for c in self._captured if c in updates}
        depth = len(self.path)
        below = [path[depth:] for path in self.called if path[:depth] == self.path]
        if sown:
            deposit(self._node, sown, below)
        if in_filter(changeable, "intermediates") and "intermediates" not in self._captured:
            updates = {"intermediates": {}, **updates}
        write(self._node, self._contents, self.variables, updates)

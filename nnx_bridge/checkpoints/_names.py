"""Where the variables of a Linen checkpoint stand in an NNX one."""

from __future__ import annotations

from typing import Any

from nnx_bridge._collections import to_flat_state
from nnx_bridge.checkpoints._entries import Entries, Path, below, is_empty, nested
from nnx_bridge.checkpoints._layout import Linen
from nnx_bridge.checkpoints._plan import marked

VALUE = "value"


class Names:
    """The NNX paths of Linen variables: those of `nnx_bridge.to_state`, or marks for a plan.

    A variable may hold a list, or trees with lists in them: what is in it has the path of the
    variable, and then its own.
    """

    def __init__(self, entries: Entries, layout: Linen, planned: bool) -> None:
        self.of: dict[str, dict[Path, Path]] = {}
        variables: dict[Path, None] = {}
        for collection, root in layout.collections.items():
            inner = {p: leaf for p, leaf in below(entries, root).items() if p}
            variable_of = unboxed(inner)
            paths = [variable_of[p] for p, leaf in inner.items() if not is_empty(leaf)]
            self.of[collection] = dict.fromkeys(paths, ())
            variables.update(dict.fromkeys((collection, *_holder(p)) for p in paths))
        if planned:
            self.of = {c: {p: (*marked(c, p), VALUE) for p in of} for c, of in self.of.items()}
            return
        tree: Any = nested({p: _Placeholder(p) for p in variables})
        places = {v.get_value().path: path for path, v in to_flat_state(tree or {})}
        for collection, of in self.of.items():
            for p in of:
                holder = _holder(p)
                of[p] = (*map(str, places[collection, *holder]), VALUE, *p[len(holder) :])


def _holder(path: Path) -> Path:
    """The path of the variable that a leaf is in: paths of variables have no places in lists."""
    at = next((i for i, part in enumerate(path) if isinstance(part, int)), len(path))
    return path[:at]


class _Placeholder:
    """Stands for a variable whose value does not matter."""

    def __init__(self, path: Path) -> None:
        self.path = path


def unboxed(entries: Entries) -> dict[Path, Path]:
    """The paths of the variables that leaves belong to, by the paths of the leaves.

    What is in a metadata box is saved one level below its variable, alone, as `value`.
    """
    children: dict[Path, set[str | int]] = {}
    for path in entries:
        for depth, part in enumerate(path):
            children.setdefault(path[:depth], set()).add(part)
    return {
        path: path[:-1] if len(path) > 1 and children[path[:-1]] == {VALUE} else path
        for path in entries
    }

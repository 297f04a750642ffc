"""What a call on NNX modules wrote, as a pytree that may leave a JAX transform."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from lifted._errors import Path, key_of
from lifted._trees import Static


@dataclasses.dataclass(frozen=True)
class Old:
    """Stands for an array that a call was given.

    Attributes:
      place: its number among the inputs.
      path: of the Variable that it was in.
      number: its number in that Variable.
    """

    place: int
    path: Path
    number: int


@dataclasses.dataclass(frozen=True)
class Written:
    """A Variable, or a bare array of a module, as a call left it.

    Attributes:
      path: where it is, first the number of the target.
      leaf: the Variable, or the bare array; in it an `Old` for each array that is as before.
      before: None for what is new; otherwise its path before the call.
    """

    path: Path
    leaf: Any
    before: Path | None


@dataclasses.dataclass(frozen=True)
class Graph:
    """A graph that a call has changed.

    Attributes:
      definition: of the new graph.
      treedef: structure of the list of its leaves.
      sources: for each part of its leaves the input that it is, or None for the next of
        `NNXUpdates.leaves`.
      paths: of its leaves.
      before: for each of its leaves the path that it had before the call, None for a new one.
      elsewhere: of its leaves those that are Variables of the caller that are no plain ones: the
        number of the leaf, and that of the Variable among the leaves of the targets.
      created: numbers of its leaves that hold an array reference made by the call.
    """

    definition: Any
    treedef: Any
    sources: list[Old | None]
    paths: list[Path]
    before: list[Path | None]
    elsewhere: list[tuple[int, int]]
    created: list[int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NNXUpdates:
    """What one call wrote.

    Attributes:
      changed: for each target the Variables that are new or have a new value, by path.
      leaves: where the graph changed, what its leaves hold that was not there before.
      graph: where the graph changed, the new `Graph`.
    """

    changed: list[nnx.State]
    leaves: list[Any]
    graph: Static

    def written(self) -> tuple[list[Written], Callable[[list[Any]], "NNXUpdates"]]:
        """What `publish` would write, leaf by leaf, and a function that makes updates of such
        leaves again, with other values or metadata."""
        static = self.graph
        graph: Graph | None = static.value
        if graph is None:
            found, treedef = jax.tree_util.tree_flatten_with_path(self.changed, is_leaf=_is_leaf)
            restored: Any = treedef
            paths = [tuple(map(key_of, path)) for path, _ in found]
            entries = [Written(p, leaf, p) for p, (_, leaf) in zip(paths, found, strict=True)]
            return entries, lambda new: NNXUpdates(restored.unflatten(new), [], static)
        values = iter(self.leaves)
        parts = [next(values) if source is None else source for source in graph.sources]
        both = zip(graph.paths, graph.treedef.unflatten(parts), graph.before, strict=True)

        def close(new: list[Any]) -> NNXUpdates:
            parts, treedef = jax.tree.flatten(new)
            sources = [part if isinstance(part, Old) else None for part in parts]
            fresh = [part for part in parts if not isinstance(part, Old)]
            changed = dataclasses.replace(graph, treedef=treedef, sources=sources)
            return NNXUpdates([], fresh, Static(changed))

        return [Written(*entry) for entry in both], close

    @staticmethod
    def nothing(targets: int) -> "NNXUpdates":
        """The updates of a call that wrote nothing."""
        return NNXUpdates([nnx.State({}) for _ in range(targets)], [], Static(None))

    def replaced(self, leaves: Mapping[Path, Any]) -> "NNXUpdates":
        """These updates, but that the Variables that were at some paths before become ``leaves``,
        whether the call wrote them or not."""
        if self.graph.value is not None:
            entries, close = self.written()
            return close([leaves.get(entry.before or (), entry.leaf) for entry in entries])
        changed = list(self.changed)
        for (target, *path), leaf in leaves.items():
            if path:
                flat_state = dict(nnx.to_flat_state(changed[target])) | {tuple(path): leaf}
                changed[target] = nnx.from_flat_state(list(flat_state.items()))
            else:
                changed[target] = leaf
        return NNXUpdates(changed, [], self.graph)


def _is_leaf(x: Any) -> bool:
    return isinstance(x, nnx.Variable)

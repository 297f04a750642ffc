"""The functionaliser of NNX: modules and Variables as a pure function of their Variables.

A call runs on copies of the targets, made in the trace in which it runs, so that everything that
NNX allows is allowed: Variables are written, created, replaced and deleted, attributes are set,
submodules and Variables are shared. What changed is found by comparison. As long as the graph is
the same, only the Variables whose values changed are written back; otherwise every node of the
graph is brought to the state of its copy. Variables that keep their values elsewhere (`_storage`)
have plain copies, and get back what these hold.

The variables of a target are an `nnx.State`, as `nnx.state` gives it. A Variable that several
targets hold belongs to the first.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.errors import TraceContextError

from lifted._errors import Path, dtype_of
from lifted._group import Filter, register_group
from lifted._trees import Static, identical
from nnx_bridge import _flax_private
from nnx_bridge._variable_types import collection_name
from nnx_bridge.functional._filters import to_predicate, visibility
from nnx_bridge.functional._hidden import without
from nnx_bridge.functional._skeleton import take_apart
from nnx_bridge.functional._snapshot import Snapshot
from nnx_bridge.functional._storage import (
    check_fits,
    check_writable,
    holds_reference,
    is_plain,
    plain,
    write,
)
from nnx_bridge.functional._tangents import as_state, visible_for
from nnx_bridge.functional._updates import Graph, NNXUpdates, Old


class NNXGroup:
    """NNX modules and Variables; see `lifted._group.Group`.

    Attributes:
      shown: what is in ``variables`` by path, first the number of the target.
    """

    initializing = False

    def __init__(
        self, targets: Sequence[Any], *, variables: Filter, frozen: Filter, rngs: Filter
    ) -> None:
        self._are_variables = [isinstance(target, nnx.Variable) for target in targets]
        self._skeleton, self._paths, self._originals, self._nodes = take_apart(tuple(targets))
        # Asked here, since inside a JAX transform even this question would be an operation.
        self._elsewhere = [i for i, leaf in enumerate(self._originals) if not is_plain(leaf)]
        self._referring = [i for i in self._elsewhere if holds_reference(self._originals[i])]
        # What stands for the originals: Variables that hold their values themselves.
        self._leaves = list(self._originals)
        for i in self._elsewhere:
            self._leaves[i] = plain(self._originals[i])
        visible = visibility(variables, frozen, rngs)
        self._hidden = [
            path
            for path, leaf in zip(self._paths, self._leaves, strict=True)
            if not visible(path[1:], leaf)
        ]
        unseen = {*self._hidden, *_flax_private.captures_of_lists(self._paths)}
        self.shown = {
            path: leaf
            for path, leaf in zip(self._paths, self._leaves, strict=True)
            if path not in unseen
        }
        self.variables = self.by_target(self.shown)

    @property
    def definition(self) -> Any:
        """What is static of the targets; hashable."""
        return self._skeleton, jax.tree.structure(self._leaves)

    def bare(self) -> "NNXGroup":
        """This group without the targets and with shapes in the place of the arrays in `variables`:
        for a function that JAX may keep. There is nothing that it could publish to."""
        other = copy.copy(self)
        other._originals, other._nodes = [], []
        other.variables = jax.tree.map(_shape, self.variables)
        other.shown = shapes = self.flat(other.variables)
        other._leaves = [
            shapes.get(path, leaf) for path, leaf in zip(self._paths, self._leaves, strict=True)
        ]
        return other

    def opened(
        self, variables: list[Any]
    ) -> contextlib.AbstractContextManager[tuple[list[Any], Callable[[], NNXUpdates]]]:
        return self.opened_at(self.flat(variables))

    @contextlib.contextmanager
    def opened_at(
        self, given: Mapping[Path, Any]
    ) -> Iterator[tuple[list[Any], Callable[[], NNXUpdates]]]:
        """`opened` with variables in the form of `shown`."""
        leaves = [
            given.get(path, leaf) for path, leaf in zip(self._paths, self._leaves, strict=True)
        ]
        # New Variables in new containers: what the call writes in place is not the caller's.
        parts, treedef = jax.tree.flatten(leaves)
        fresh = treedef.unflatten(parts)  # type: ignore[attr-defined]
        copies, nodes = self._skeleton.copy(fresh)
        snapshot = Snapshot(nodes)
        targets = list(copies)
        with _explained(), contextlib.ExitStack() as hiding:
            hiding.enter_context(without(targets, self._hidden))

            def written() -> NNXUpdates:
                hiding.close()
                for i in self._referring:
                    check_fits(self._paths[i][1:], self._leaves[i], fresh[i])
                if snapshot.holds():
                    return NNXUpdates(self._changed(leaves, self._paths, fresh), [], Static(None))
                return self._regraph(leaves, fresh, copies, nodes)

            yield targets, written

    def publish(self, updates: NNXUpdates) -> None:
        if updates.graph.value is None:
            originals = dict(zip(self._paths, self._originals, strict=True))
            changed = [(p, originals[p], v) for p, v in self.flat(updates.changed).items()]
            for path, original, _ in changed:
                check_writable(path[1:], original)  # All of them, before anything is written.
            for _, original, variable in changed:
                write(original, variable)
            return
        graph: Graph = updates.graph.value
        old, new = jax.tree.leaves(self._leaves), iter(updates.leaves)
        values = [next(new) if source is None else old[source.place] for source in graph.sources]
        leaves = graph.treedef.unflatten(values)
        contents = []
        for place, i in graph.elsewhere:
            original, variable = self._originals[i], leaves[place]
            leaves[place] = original
            if not _unchanged(self._leaves[i], variable):
                check_writable(self._paths[i][1:], original)
                contents.append((original, variable))
        for place in graph.created:
            leaves[place] = leaves[place].copy(ref=True)
        as_they_are = [self._originals[i] for i in self._elsewhere]
        _flax_private.update_graph(graph.definition, leaves, self._nodes, as_they_are)
        for original, variable in contents:
            write(original, variable)

    def outside(self) -> dict[Path, Any]:
        return {}  # NNX itself raises where a Variable is written in another trace.

    def restore(self, outside: dict[Path, Any]) -> None:
        pass

    def match(self, variables: list[Any], filter: Filter) -> list[Any]:
        predicate = to_predicate(filter)
        flat = self.flat(variables)
        chosen = {path: bool(predicate(path[1:], leaf)) for path, leaf in flat.items()}
        return self.by_target({p: _filled(leaf, chosen[p]) for p, leaf in flat.items()})

    def prune(self, tree: list[Any], mask: list[Any]) -> list[Any]:
        masks = self.flat(mask)
        kept = {p: x for p, x in self.flat(tree).items() if any(jax.tree.leaves(masks[p]))}
        return self.by_target(kept)

    def extend(self, variables: list[Any], updates: NNXUpdates, filter: Filter) -> None:
        return None

    def written(self, updates: NNXUpdates) -> list[Any]:
        return updates.changed

    @staticmethod
    def visible_for(tangents: Any) -> Filter:
        return visible_for(tangents)

    @staticmethod
    def as_variables(tangents: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        return [as_state(t, v) for t, v in zip(tangents, variables, strict=True)]

    def per_scope(self, tree: list[Any]) -> list[Any]:
        return tree

    def names(self, variables: list[Any]) -> list[str]:
        types = {type(x) for x in self.flat(variables).values() if isinstance(x, nnx.Variable)}
        return sorted({name for kind in types for name in (collection_name(kind), kind.__name__)})

    def _regraph(
        self, before: list[Any], fresh: list[Any], copies: Any, nodes: Sequence[Any]
    ) -> NNXUpdates:
        """The updates where the graph has changed."""
        _, paths, held, _ = _flax_private.flatten(copies)
        after = list(map(plain, held))
        given: dict[int, Old] = {}
        place = 0
        for path, leaf in zip(self._paths, before, strict=True):
            for number, part in enumerate(jax.tree.leaves(leaf)):
                given[id(part)] = Old(place, path, number)
                place += 1
        parts, treedef = jax.tree.flatten(after)
        sources = [given.get(id(part)) for part in parts]
        new = [part for part, source in zip(parts, sources, strict=True) if source is None]
        origins = {id(leaf): path for leaf, path in zip(fresh, self._paths, strict=True)}
        # Variables that are no plain ones, among those that were there and among those made here.
        there = {id(fresh[i]): i for i in self._elsewhere}
        graph = Graph(
            _flax_private.flatten_copy(copies, nodes),
            treedef,
            sources,
            paths,
            [origins.get(id(x)) for x in held],
            [(k, there[id(x)]) for k, x in enumerate(held) if id(x) in there],
            [k for k, x in enumerate(held) if holds_reference(x)],
        )
        return NNXUpdates(self._changed(before, paths, after), new, Static(graph))

    def _changed(self, before: list[Any], paths: Sequence[Path], after: list[Any]) -> list[Any]:
        old = dict(zip(self._paths, before, strict=True))
        return self.by_target(
            {
                path: leaf
                for path, leaf in zip(paths, after, strict=True)
                if path not in old or not _unchanged(old[path], leaf)
            }
        )

    def flat(self, by_target: Sequence[Any]) -> dict[Path, Any]:
        """The leaves of all targets by their paths in the tuple of targets."""
        flat = {}
        for i, tree in enumerate(by_target):
            if isinstance(tree, nnx.State):
                flat.update({(i, *path): leaf for path, leaf in nnx.to_flat_state(tree)})
            elif tree is not None:
                flat[(i,)] = tree
        return flat

    def by_target(self, flat: Mapping[Path, Any]) -> list[Any]:
        """The inverse of `flat`: a state for each module; for a target that is a Variable that
        one, or None."""
        trees: list[Any] = []
        for i, is_variable in enumerate(self._are_variables):
            of_target = [(path[1:], leaf) for path, leaf in flat.items() if path[0] == i]
            if is_variable:
                trees.append(of_target[0][1] if of_target else None)
            else:
                trees.append(nnx.from_flat_state(of_target) if of_target else nnx.State({}))
        return trees


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Says what to do where ``fn`` writes to a module that it closes over."""
    try:
        yield
    except TraceContextError as error:
        note = (
            "Does fn write to a module that it closes over? Put that module into mdl, which may be "
            "a pytree: a transform calls fn((mdl, other), ...) for mdl=(mdl, other)."
        )
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def _unchanged(before: Any, after: Any) -> bool:
    """`identical`, without taking Variables apart where that can be avoided."""
    if type(before) is type(after) and issubclass(type(before), nnx.Variable):
        same_value = before.get_raw_value() is after.get_raw_value()
        if same_value and _flax_private.same_metadata(before, after):
            return True
    return identical(before, after)


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(np.shape(x), dtype_of(x))


def _filled(tree: Any, value: Any) -> Any:
    return jax.tree.map(lambda _: value, tree)


register_group(
    lambda x: isinstance(x, (nnx.Pytree, nnx.Variable)),
    NNXGroup,
    is_value=lambda x: isinstance(x, (nnx.State, nnx.Variable)),
)

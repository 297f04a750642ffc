"""The functionaliser of Linen: bound modules and scopes as a pure function of their variables.

A module may reach several scopes: its own, and those of modules that were given to it as attributes
but belong to someone else. A scope below another scope of the same call is reached through that
one; what remains are the *roots*. Each root gets a fresh scope with the given variables, each
module a copy on the fresh scopes.

The variables of a target are the collections of its own scope. Those of a module that was given to
it stand below the name of the attribute, where they would stand if the target owned that module.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
from flax import linen as nn
from flax.core.scope import Scope, in_filter, intersect_filters, union_filters
from flax.errors import InvalidFilterError

from lifted import _flax_private
from lifted._errors import Path, key_of
from lifted._group import Filter, register_group
from lifted._nested import (
    ABSENT,
    Collections,
    advance,
    difference,
    flat,
    mount,
    prune,
    put_back,
    put_new,
    take,
    thaw,
)
from lifted._scopes import Root, descend, find_roots
from lifted._trees import Static


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinenUpdates:
    """What one call wrote: for each root the variables; and the RNG counters and module states that
    it ended with."""

    variables: list[Collections]
    static: Static


class LinenGroup:
    """Bound Linen modules and scopes; see `lifted._group.Group`."""

    def __init__(
        self, targets: Sequence[Any], *, variables: Filter, frozen: Filter, rngs: Filter
    ) -> None:
        self._targets = targets
        for target in targets:
            _check_bound(target)
        self._scopes = [
            [t] if isinstance(t, Scope) else _flax_private.module_scopes(t) for t in targets
        ]
        self._roots = find_roots(targets, self._scopes)
        self._states = [
            None if isinstance(t, Scope) else _flax_private.export_state(t) for t in targets
        ]
        self.initializing = any(root.scope.get_flag("initializing", False) for root in self._roots)
        self._rngs = _checked(rngs)
        visible = union_filters(_checked(variables), self._collections(frozen))
        # Inside `init` what is visible has yet to be created.
        self._writable = visible if self.initializing else variables
        self.variables = self._by_target(
            [
                {c: values for c, values in root.scope.variables().items() if in_filter(visible, c)}
                for root in self._roots
            ]
        )

    @contextlib.contextmanager
    def opened(
        self, variables: list[Collections]
    ) -> Iterator[tuple[list[Any], Callable[[], LinenUpdates]]]:
        before = self._by_root(variables)
        inner = [
            self._open(root, thaw(collections))
            for root, collections in zip(self._roots, before, strict=True)
        ]
        scopes = [
            [descend(inner, self._roots, scope) for scope in reached] for reached in self._scopes
        ]
        copies = [
            reached[-1]
            if state is None
            else _flax_private.rebind(target, reached, _flax_private.copy_state(state))
            for target, reached, state in zip(self._targets, scopes, self._states, strict=True)
        ]

        def written() -> LinenUpdates:
            pairs = zip(before, inner, strict=True)
            changed = [difference(old, scope.mutable_variables()) for old, scope in pairs]
            states = [
                None if isinstance(c, Scope) else _flax_private.export_state(c) for c in copies
            ]
            counters = [scope.rng_counters for scope in inner]
            return LinenUpdates(changed, Static((counters, states)))

        try:
            with self._within(copies):
                yield copies, written
        finally:
            for scope in (*inner, *(scope for reached in scopes for scope in reached)):
                scope.invalidate()

    def publish(self, updates: LinenUpdates) -> None:
        counters, states = updates.static.value
        for root, collections, ended in zip(self._roots, updates.variables, counters, strict=True):
            for col, values in collections.items():
                for name, value in values.items():
                    root.scope.put_variable(col, name, value)
            advance(root.scope.rng_counters, ended)
        for target, state in zip(self._targets, states, strict=True):
            if state is not None:
                _flax_private.import_state(target, state)

    def outside(self) -> dict[Path, Any]:
        held: dict[Path, Any] = {}
        for collections in self._outer_collections():
            held.update(flat(collections, ()))
        return held

    def restore(self, outside: dict[Path, Any]) -> None:
        for collections in self._outer_collections():
            for path, value in list(flat(collections, ())):
                if outside.get(path, ABSENT) is not value:
                    put_back(collections, path, outside.get(path, ABSENT))

    def _outer_collections(self) -> list[Collections]:
        """The collections, of the whole models that the targets belong to, that may be written."""
        models = {id(root.scope.root): root.scope.root for root in self._roots}
        return [_flax_private.live_collections(scope) for scope in models.values()]

    def _collections(self, filter: Filter) -> Filter:
        """``filter`` as a filter of collections: those in which a predicate selects anything."""
        if isinstance(filter, (list, tuple)) and not all(isinstance(f, str) for f in filter):
            return functools.reduce(
                union_filters, map(self._collections, filter), cast(Filter, False)
            )
        if not callable(filter):
            return _checked(filter)
        trees = self._by_target([dict(root.scope.variables()) for root in self._roots])
        masks = self.match(trees, filter)
        return {col for mask in masks for col in mask if any(jax.tree.leaves(mask[col]))}

    def match(self, variables: list[Collections], filter: Filter) -> list[Collections]:
        if isinstance(filter, (list, tuple)) and not all(isinstance(f, str) for f in filter):
            masks = [self.match(variables, f) for f in filter]
            return jax.tree.map(lambda *chosen: any(chosen), *masks)
        if callable(filter):
            named = lambda path, x: bool(filter(tuple(map(key_of, path)), x))  # noqa: E731
            return [jax.tree_util.tree_map_with_path(named, tree) for tree in variables]
        filter = _checked(filter)
        chosen = {col: in_filter(filter, col) for tree in variables for col in tree}
        return [
            {col: jax.tree.map(lambda _, c=col: chosen[c], values) for col, values in tree.items()}
            for tree in variables
        ]

    def prune(self, tree: list[Collections], mask: list[Collections]) -> list[Collections]:
        return [prune(t, m) for t, m in zip(tree, mask, strict=True)]

    def extend(
        self, variables: list[Collections], updates: LinenUpdates, filter: Filter
    ) -> list[Collections] | None:
        written = self.written(updates)
        selected = self.prune(written, self.match(written, filter))
        extended = [thaw(tree) for tree in variables]
        added = [put_new(tree, new) for tree, new in zip(extended, selected, strict=True)]
        return extended if any(added) else None

    def written(self, updates: LinenUpdates) -> list[Collections]:
        return self._by_target(updates.variables)

    @staticmethod
    def visible_for(tangents: Any) -> Filter:
        return tuple(map(str, tangents)) if isinstance(tangents, Mapping) else False

    @staticmethod
    def as_variables(tangents: Sequence[Any], variables: Sequence[Collections]) -> list[Any]:
        return list(tangents)

    def per_scope(self, tree: list[Collections]) -> list[Collections]:
        return self._by_root(tree)

    def names(self, variables: list[Collections]) -> list[str]:
        return sorted({col for tree in variables for col in tree})

    def _within(self, copies: list[Any]) -> contextlib.AbstractContextManager[None]:
        """A context in which modules that are made belong to the copy of the module whose method
        runs, if that is a target, otherwise to that of the first target."""
        modules = [i for i, target in enumerate(self._targets) if isinstance(target, nn.Module)]
        if not modules:
            return contextlib.nullcontext()
        current = _flax_private.current_module()
        owner = next((i for i in modules if self._targets[i] is current), modules[0])
        return _flax_private.within(copies[owner])

    def _open(self, root: Root, collections: Collections) -> Scope:
        outer = root.scope
        scope = Scope(
            collections,
            name=outer.name,
            rngs={name: rng for name, rng in outer.rngs.items() if in_filter(self._rngs, name)},
            mutable=intersect_filters(outer.mutable, self._writable),
            parent=None,
            path=outer.path,
            debug_path=outer.debug_path,
            flags=outer.flags,
        )
        scope.rng_counters = thaw(outer.rng_counters)
        return scope

    def _by_target(self, by_root: list[Collections]) -> list[Collections]:
        trees: list[Collections] = [{} for _ in self._targets]
        for root, collections in zip(self._roots, by_root, strict=True):
            for col, values in collections.items():
                mount(trees[root.target], (col, *root.mount), values)
        return trees

    def _by_root(self, variables: list[Collections]) -> list[Collections]:
        """The variables of each root, in dictionaries of their own."""
        rest = [thaw(tree) for tree in variables]
        roots: dict[int, Collections] = {}
        # What is mounted stands inside the variables of another root, so the deepest is taken out
        # first.
        for i in sorted(range(len(self._roots)), key=lambda i: -len(self._roots[i].mount)):
            root = self._roots[i]
            taken = {
                col: take(rest[root.target], (col, *root.mount)) for col in list(rest[root.target])
            }
            roots[i] = {col: values for col, values in taken.items() if values is not None}
        return [roots[i] for i in range(len(self._roots))]


def _checked(filter: Filter) -> Filter:
    """``filter``, a filter of collections or RNG streams.

    Raises:
      TypeError: it is none.
    """
    try:
        in_filter(filter, "")
    except InvalidFilterError:
        raise TypeError(
            "filter: expected a bool, the name of a collection or of an RNG stream, a sequence of "
            "names, a flax.core.DenyList, or, for the variables to differentiate, a predicate "
            f"(path, value) -> bool; got {filter!r}."
        ) from None
    return filter


def _check_bound(target: Any) -> None:
    if isinstance(target, nn.Module) and target.scope is None:
        raise ValueError(
            f"mdl: {type(target).__name__} is not bound to variables. Call this inside a method of "
            "a module that owns it, or give it variables first: mdl.bind(variables, rngs=..., "
            "mutable=...)."
        )


register_group(lambda x: isinstance(x, (nn.Module, Scope)), LinenGroup)

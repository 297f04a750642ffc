"""The functionaliser of Linen: bound modules and scopes as a pure function of their variables.

A module may reach several scopes: its own, and those of modules that were given to it as attributes
but belong to someone else. A scope below another scope of the same call is reached through that
one; what remains are the *roots*. Each root gets a fresh scope with the given variables, each
module a copy on the fresh scopes.

The variables of a target are the collections of its own scope. Those of a module that was given to
it stand below the name of the attribute, where they would stand if the target owned that module.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core.scope import Scope, in_filter, intersect_filters, union_filters
from flax.errors import InvalidFilterError

from lifted import _flax_private
from lifted._errors import Path, key_of
from lifted._functional import Filter, register_group
from lifted._trees import Static, identical

Collections = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinenUpdates:
    """What one call wrote: for each root the variables; and the RNG counters and module states that
    it ended with."""

    variables: list[Collections]
    static: Static


@dataclasses.dataclass(frozen=True)
class _Root:
    """A scope that is functionalised, and the place of its variables: in which target, below which
    path."""

    scope: Scope
    target: int
    mount: Path


class LinenGroup:
    """Bound Linen modules and scopes; see `lifted._functional.Group`."""

    def __init__(
        self, targets: Sequence[Any], *, variables: Filter, frozen: Filter, rngs: Filter
    ) -> None:
        self._targets = targets
        for target in targets:
            _check_bound(target)
        self._scopes = [
            [t] if isinstance(t, Scope) else _flax_private.module_scopes(t) for t in targets
        ]
        self._roots = _find_roots(targets, self._scopes)
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
                {
                    col: values
                    for col, values in root.scope.variables().items()
                    if in_filter(visible, col)
                }
                for root in self._roots
            ]
        )

    def __call__(
        self, variables: list[Collections], body: Callable[[list[Any]], Any]
    ) -> tuple[Any, LinenUpdates]:
        before = self._by_root(variables)
        inner = [
            self._open(root, _thaw(collections))
            for root, collections in zip(self._roots, before, strict=True)
        ]
        scopes = [
            [_descend(inner, self._roots, scope) for scope in reached] for reached in self._scopes
        ]
        copies = [
            reached[-1]
            if state is None
            else _flax_private.rebind(target, reached, _flax_private.copy_state(state))
            for target, reached, state in zip(self._targets, scopes, self._states, strict=True)
        ]
        try:
            y = self._run(body, copies)
            written = [
                _difference(old, scope.mutable_variables())
                for old, scope in zip(before, inner, strict=True)
            ]
        finally:
            for scope in (*inner, *(scope for reached in scopes for scope in reached)):
                scope.invalidate()
        states = [None if isinstance(c, Scope) else _flax_private.export_state(c) for c in copies]
        return y, LinenUpdates(written, Static(([scope.rng_counters for scope in inner], states)))

    def publish(self, updates: LinenUpdates) -> None:
        counters, states = updates.static.value
        for root, collections, ended in zip(self._roots, updates.variables, counters, strict=True):
            for col, values in collections.items():
                for name, value in values.items():
                    root.scope.put_variable(col, name, value)
            _advance(root.scope.rng_counters, ended)
        for target, state in zip(self._targets, states, strict=True):
            if state is not None:
                _flax_private.import_state(target, state)

    def outside(self) -> dict[Path, Any]:
        held: dict[Path, Any] = {}
        for scope in self._outer_scopes():
            held.update(_flat(scope.mutable_variables(), ()))
        return held

    def restore(self, outside: dict[Path, Any]) -> None:
        for scope in self._outer_scopes():
            collections = scope.mutable_variables()
            for path, value in list(_flat(collections, ())):
                if outside.get(path, _ABSENT) is not value:
                    _take(collections, path)
                    if path in outside:
                        _mount(collections, path, outside[path])

    def _outer_scopes(self) -> list[Scope]:
        return list({id(r.scope.root): r.scope.root for r in self._roots}.values())

    def _collections(self, filter: Filter) -> Filter:
        """``filter`` as a filter of collections: those in which a predicate selects anything."""
        if isinstance(filter, (list, tuple)) and not all(isinstance(f, str) for f in filter):
            return functools.reduce(union_filters, map(self._collections, filter), False)
        if not callable(filter):
            return _checked(filter)
        trees = self._by_target([root.scope.variables() for root in self._roots])
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
        return [_prune(t, m) for t, m in zip(tree, mask, strict=True)]

    def extend(
        self, variables: list[Collections], updates: LinenUpdates, filter: Filter
    ) -> list[Collections] | None:
        written = self.written(updates)
        selected = self.prune(written, self.match(written, filter))
        extended = [_thaw(tree) for tree in variables]
        added = [_put_new(tree, new) for tree, new in zip(extended, selected, strict=True)]
        return extended if any(added) else None

    def written(self, updates: LinenUpdates) -> list[Collections]:
        return self._by_target(updates.variables)

    @staticmethod
    def as_variables(tangents: Sequence[Any], variables: Sequence[Collections]) -> list[Any]:
        return list(tangents)

    def per_scope(self, tree: list[Collections]) -> list[Collections]:
        return self._by_root(tree)

    def names(self, variables: list[Collections]) -> list[str]:
        return sorted({col for tree in variables for col in tree})

    def _run(self, body: Callable[[list[Any]], Any], copies: list[Any]) -> Any:
        """``body`` on the copies. Modules that it makes belong to the module whose method runs, if
        that is a target, otherwise to the first target."""
        modules = [i for i, target in enumerate(self._targets) if isinstance(target, nn.Module)]
        if not modules:
            return body(copies)
        current = _flax_private.current_module()
        owner = next((i for i in modules if self._targets[i] is current), modules[0])
        return _flax_private.call_within(copies[owner], lambda: body(copies))

    def _open(self, root: _Root, collections: Collections) -> Scope:
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
        scope.rng_counters = _thaw(outer.rng_counters)
        return scope

    def _by_target(self, by_root: list[Collections]) -> list[Collections]:
        trees: list[Collections] = [{} for _ in self._targets]
        for root, collections in zip(self._roots, by_root, strict=True):
            for col, values in collections.items():
                _mount(trees[root.target], (col, *root.mount), values)
        return trees

    def _by_root(self, variables: list[Collections]) -> list[Collections]:
        """The variables of each root, in dictionaries of their own."""
        rest = [_thaw(tree) for tree in variables]
        roots: dict[int, Collections] = {}
        # What is mounted stands inside the variables of another root, so the deepest is taken out
        # first.
        for i in sorted(range(len(self._roots)), key=lambda i: -len(self._roots[i].mount)):
            root = self._roots[i]
            taken = {
                col: _take(rest[root.target], (col, *root.mount)) for col in list(rest[root.target])
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
            f"mdl: {type(target).__name__} is not bound to variables. Call this inside a method "
            "of a module that owns "
            "it, or give it variables first: mdl.bind(variables, rngs=..., mutable=...)."
        )


def _find_roots(targets: Sequence[Any], scopes: list[list[Scope]]) -> list[_Root]:
    roots: list[_Root] = []
    reached = [(scope, t) for t, of_target in enumerate(scopes) for scope in of_target]
    for scope, t in reached:
        if any(_path_below(other, scope) for other, _ in reached) or any(
            _same(r.scope, scope) for r in roots
        ):
            continue
        mount = _mount_of(targets[t], scope)
        if any(root.target == t and root.mount == mount for root in roots):
            mount = tuple(scope.path)
        roots.append(_Root(scope, t, mount))
    return roots


def _same(scope: Scope, other: Scope) -> bool:
    return scope.root is other.root and scope.path == other.path


def _path_below(ancestor: Scope, scope: Scope) -> Path | None:
    """Path from ``ancestor`` to a scope strictly below it, None for any other scope."""
    n = len(ancestor.path)
    if scope.root is ancestor.root and len(scope.path) > n and scope.path[:n] == ancestor.path:
        return tuple(scope.path[n:])
    return None


def _descend(inner: list[Scope], roots: list[_Root], scope: Scope) -> Scope:
    """A new inner scope that stands for ``scope``: names may be taken in it as in no other."""
    for root, opened in zip(roots, inner, strict=True):
        if _same(root.scope, scope):
            return opened.rewound()
    for root, opened in zip(roots, inner, strict=True):
        path = _path_below(root.scope, scope)
        if path is not None:
            for name in path:
                opened = opened.push(name, reuse=True)
            return opened
    raise AssertionError(f"no root for the scope at {scope.path_text}")


def _mount_of(target: Any, scope: Scope) -> Path:
    """Where the variables of ``scope`` stand in those of ``target``: below the attribute that holds
    their module."""
    if isinstance(target, Scope) or _same(target.scope, scope):
        return ()
    return next((path for path, held in _held(target, ()) if _same(held, scope)), tuple(scope.path))


def _held(module: nn.Module, path: Path) -> Iterator[tuple[Path, Scope]]:
    """Scopes of modules and variables in the fields of ``module``, named as Linen names submodules
    in containers."""
    for field in dataclasses.fields(module):
        if field.name == "parent" or not field.init:
            continue
        value = getattr(module, field.name)
        for entries, leaf in jax.tree_util.tree_leaves_with_path(value):
            scope = (
                getattr(leaf, "scope", None) if isinstance(leaf, (nn.Module, nn.Variable)) else None
            )
            if scope is not None:
                name = "_".join([field.name, *(str(key_of(entry)) for entry in entries)])
                yield (*path, name), scope
                if isinstance(leaf, nn.Module):
                    yield from _held(leaf, (*path, name))


def _thaw(tree: Any) -> Any:
    """``tree`` in new dictionaries, with the same keys and leaves."""
    if isinstance(tree, Mapping):
        return {key: _thaw(value) for key, value in tree.items()}
    return tree


def _flat(tree: Mapping[str, Any], path: Path) -> Iterator[tuple[Path, Any]]:
    """The variables in ``tree`` by their paths."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*path, key))
        else:
            yield (*path, key), value


def _mount(collections: Collections, path: Path, values: Any) -> None:
    """Puts ``values`` at ``path``, beside what stands there."""
    *parents, last = path
    for key in parents:
        collections[key] = _thaw(collections.get(key, {}))
        collections = collections[key]
    here = collections.get(last)
    collections[last] = {**_thaw(here), **values} if here else values


def _take(collections: Collections, path: Path) -> Any:
    """Removes and returns what stands at ``path``; None where nothing does."""
    *parents, last = path
    for key in parents:
        collections = collections.get(key, {})
    return collections.pop(last, None)


_ABSENT = object()


def _difference(old: Any, new: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of ``new`` that are not the same objects in ``old``."""
    changed = {}
    for key, value in new.items():
        before = old.get(key, _ABSENT) if isinstance(old, Mapping) else _ABSENT
        if isinstance(value, Mapping):
            inner = _difference(before, value)
            if inner or before is _ABSENT:
                changed[key] = inner
        elif before is _ABSENT or not identical(before, value):
            changed[key] = value
    return changed


def _prune(tree: Any, mask: Any) -> Any:
    """``tree`` without the entries of dictionaries whose mask is False throughout."""
    if not isinstance(tree, Mapping):
        return tree
    kept = {
        key: _prune(value, mask[key])
        for key, value in tree.items()
        if any(jax.tree.leaves(mask[key]))
    }
    return kept if len(kept) < len(tree) or any(kept[k] is not tree[k] for k in tree) else tree


def _put_new(old: Any, new: Mapping[str, Any]) -> bool:
    """Adds to ``old`` the variables of ``new`` that it lacks; whether there were any."""
    added = False
    for key, value in new.items():
        if key not in old:
            old[key] = value
            added = True
        elif isinstance(value, Mapping):
            added |= _put_new(old[key], value)
    return added


def _advance(counters: dict[Any, Any], ended: dict[Any, Any]) -> None:
    """Brings RNG counters to where a copy of them ended; in place, since scopes below hold parts of
    them."""
    for key, value in ended.items():
        if isinstance(value, dict):
            _advance(counters.setdefault(key, {}), value)
        else:
            counters[key] = value


register_group(lambda x: isinstance(x, (nn.Module, Scope)), LinenGroup)

"""Nested dictionaries of variables: collections, as Linen keeps them."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from lifted._errors import Path
from lifted._trees import identical

Collections = dict[str, Any]
ABSENT = object()


def thaw(tree: Any) -> Any:
    """``tree`` in new dictionaries, with the same keys and leaves."""
    if isinstance(tree, Mapping):
        return {key: thaw(value) for key, value in tree.items()}
    return tree


def flat(tree: Mapping[str, Any], path: Path) -> Iterator[tuple[Path, Any]]:
    """The variables in ``tree`` by their paths."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, (*path, key))
        else:
            yield (*path, key), value


def mount(collections: Collections, path: Path, values: Any) -> None:
    """Puts ``values`` at ``path``, beside what stands there."""
    *parents, last = path
    for key in parents:
        collections[key] = thaw(collections.get(key, {}))
        collections = collections[key]
    here = collections.get(last)
    collections[last] = {**thaw(here), **values} if here else values


def take(collections: Collections, path: Path) -> Any:
    """Removes and returns what stands at ``path``; None where nothing does."""
    *parents, last = path
    for key in parents:
        collections = collections.get(key, {})
    return collections.pop(last, None)


def put_back(collections: Collections, path: Path, value: Any) -> None:
    """Makes ``value`` stand at ``path`` again, or nothing where it is ABSENT; in place."""
    *parents, last = path
    for key in parents:
        collections = collections[key]
    if value is ABSENT:
        del collections[last]
    else:
        collections[last] = value


def difference(old: Any, new: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of ``new`` that are not the same objects in ``old``."""
    changed = {}
    for key, value in new.items():
        before = old.get(key, ABSENT) if isinstance(old, Mapping) else ABSENT
        if isinstance(value, Mapping):
            inner = difference(before, value)
            if inner or before is ABSENT:
                changed[key] = inner
        elif before is ABSENT or not identical(before, value):
            changed[key] = value
    return changed


def prune(tree: Any, mask: Any) -> Any:
    """``tree`` without the entries of dictionaries whose mask is False throughout."""
    if not isinstance(tree, Mapping):
        return tree
    kept = {
        key: prune(value, mask[key])
        for key, value in tree.items()
        if any(jax.tree.leaves(mask[key]))
    }
    return kept if len(kept) < len(tree) or any(kept[k] is not tree[k] for k in tree) else tree


def put_new(old: Any, new: Mapping[str, Any]) -> bool:
    """Adds to ``old`` the variables of ``new`` that it lacks; whether there were any."""
    added = False
    for key, value in new.items():
        if key not in old:
            old[key] = value
            added = True
        elif isinstance(value, Mapping):
            added |= put_new(old[key], value)
    return added


def advance(counters: dict[Any, Any], ended: dict[Any, Any]) -> None:
    """Brings RNG counters to where a copy of them ended; in place, since scopes below hold parts of
    them."""
    for key, value in ended.items():
        if isinstance(value, dict):
            advance(counters.setdefault(key, {}), value)
        else:
            counters[key] = value

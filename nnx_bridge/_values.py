"""Pytrees as Linen modules hold and pass them: JAX's, but with any keys in their dicts.

JAX sorts the keys of a dict, which fails for those that have no order, such as members of an
enumeration. In a field, or in an argument that is not traced, Linen takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax.core import FrozenDict
from jax.tree_util import DictKey

IsLeaf = Callable[[Any], bool]
Keys = tuple[Any, ...]  # As JAX has them; `jax.tree_util.keystr` makes text of them.


def leaves(tree: Any, is_leaf: IsLeaf = lambda _: False) -> Iterator[tuple[Keys, Any]]:
    """The leaves of a pytree with their paths."""
    if _is_dict(tree) and not is_leaf(tree):
        for key in _in_order(tree):
            for below, leaf in leaves(tree[key], is_leaf):
                yield (DictKey(key), *below), leaf
        return
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: is_leaf(x) or _is_dict(x))
    for keys, inner in flat:
        if _is_dict(inner) and not is_leaf(inner):
            yield from (((*keys, *below), leaf) for below, leaf in leaves(inner, is_leaf))
        else:
            yield keys, inner


def map_leaves(fn: Callable[[Any], Any], tree: Any, is_leaf: IsLeaf = lambda _: False) -> Any:
    """``fn`` of the leaves of a pytree; the same object where nothing changes."""
    return map_with_path(lambda _, leaf: fn(leaf), tree, is_leaf)


def map_with_path(
    fn: Callable[[Keys, Any], Any], tree: Any, is_leaf: IsLeaf = lambda _: False, keys: Keys = ()
) -> Any:
    """``fn`` of the paths and the leaves of a pytree; the same object where nothing changes."""
    if _is_dict(tree):
        parts = list(tree.values())
        mapped = [map_with_path(fn, x, is_leaf, (*keys, DictKey(key))) for key, x in tree.items()]
        return tree if _same(parts, mapped) else type(tree)(zip(tree, mapped, strict=True))
    flat, treedef = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: is_leaf(x) or _is_dict(x)
    )
    parts = [x for _, x in flat]
    mapped = [
        map_with_path(fn, x, is_leaf, (*keys, *below)) if _is_dict(x) else fn((*keys, *below), x)
        for below, x in flat
    ]
    return tree if _same(parts, mapped) else jax.tree.unflatten(treedef, mapped)


def _in_order(tree: Any) -> list[Any]:
    try:
        return sorted(tree)
    except TypeError:
        return sorted(tree, key=repr)


def _same(before: list[Any], after: list[Any]) -> bool:
    return all(a is b for a, b in zip(before, after, strict=True))


def _is_dict(x: Any) -> bool:
    return type(x) in (dict, FrozenDict)  # Others are registered with JAX, or leaves.

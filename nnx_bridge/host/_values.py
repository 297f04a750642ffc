"""Pytrees as Linen modules hold and pass them: JAX's, but with any keys in their dicts.

JAX sorts the keys of a dict, which fails for those that have no order, such as members of an
enumeration. In a field, or in an argument that is not traced, Linen takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax.core import FrozenDict

IsLeaf = Callable[[Any], bool]


def leaves(tree: Any, is_leaf: IsLeaf = lambda _: False) -> Iterator[tuple[str, Any]]:
    """The leaves of a pytree with their paths as text."""
    if _is_dict(tree) and not is_leaf(tree):
        for key, value in sorted(tree.items(), key=lambda item: repr(item[0])):
            for path, leaf in leaves(value, is_leaf):
                yield f"[{key!r}]{path}", leaf
        return
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: is_leaf(x) or _is_dict(x))
    for keys, inner in flat:
        path = jax.tree_util.keystr(keys)
        if _is_dict(inner) and not is_leaf(inner):
            yield from ((path + below, leaf) for below, leaf in leaves(inner, is_leaf))
        else:
            yield path, inner


def map_leaves(fn: Callable[[Any], Any], tree: Any, is_leaf: IsLeaf) -> Any:
    """``fn`` of the leaves of a pytree; the same object where nothing changes."""
    if _is_dict(tree):
        parts = list(tree.values())
        mapped = [map_leaves(fn, x, is_leaf) for x in parts]
        return tree if _same(parts, mapped) else type(tree)(zip(tree, mapped, strict=True))
    parts, treedef = jax.tree.flatten(tree, is_leaf=lambda x: is_leaf(x) or _is_dict(x))
    mapped = [map_leaves(fn, x, is_leaf) if _is_dict(x) else fn(x) for x in parts]
    return tree if _same(parts, mapped) else jax.tree.unflatten(treedef, mapped)


def _same(before: list[Any], after: list[Any]) -> bool:
    return all(a is b for a, b in zip(before, after, strict=True))


def _is_dict(x: Any) -> bool:
    return type(x) in (dict, FrozenDict)  # Others are registered with JAX, or leaves.

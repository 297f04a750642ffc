"""Which Linen scopes a call reaches, and which of them stand for all: the roots."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core.scope import Scope

from lifted._errors import Path, key_of


@dataclasses.dataclass(frozen=True)
class Root:
    """A scope that is functionalised, and the place of its variables: in which target, below which
    path."""

    scope: Scope
    target: int
    mount: Path


def find_roots(targets: Sequence[Any], scopes: list[list[Scope]]) -> list[Root]:
    roots: list[Root] = []
    reached = [(scope, t) for t, of_target in enumerate(scopes) for scope in of_target]
    for scope, t in reached:
        if any(_path_below(other, scope) for other, _ in reached) or any(
            _same(r.scope, scope) for r in roots
        ):
            continue
        mount = _mount_of(targets[t], scope)
        if any(root.target == t and root.mount == mount for root in roots):
            mount = tuple(scope.path)
        roots.append(Root(scope, t, mount))
    return roots


def _same(scope: Scope, other: Scope) -> bool:
    return scope.root is other.root and scope.path == other.path


def _path_below(ancestor: Scope, scope: Scope) -> Path | None:
    """Path from ``ancestor`` to a scope strictly below it, None for any other scope."""
    n = len(ancestor.path)
    if scope.root is ancestor.root and len(scope.path) > n and scope.path[:n] == ancestor.path:
        return tuple(scope.path[n:])
    return None


def descend(inner: list[Scope], roots: list[Root], scope: Scope) -> Scope:
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

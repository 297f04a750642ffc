"""The seam for NNX models whose variables have other names or shapes than Linen's.

Without a plan every leaf of a checkpoint has one place on the other side, so nothing is read until
it is written. A plan may join and split arrays: it gets one whole tree after the other, the
variables, then each tree in the optimizer's state that follows the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import optax
from flax.core import meta

from nnx_bridge._collections import nest
from nnx_bridge.checkpoints._entries import (
    CheckpointError,
    Entries,
    Path,
    flat,
    is_empty,
    loaded,
    written,
)

# Stands in a path in front of what belongs to a plan: a collection and the Linen path in it.
_PLANNED = "<plan>"


class Plan(Protocol):
    """How the variables of a Linen model become those of an NNX model with another layout.

    Both functions are applied to every tree that looks like the parameters, moments included. An
    empty place in such a tree, where something is masked, is an `optax.MaskedNode()`.
    """

    def to_nnx(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        """Linen variables by collection, as nested dicts by their paths in NNX."""

    def to_linen(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The inverse of `to_nnx`."""


def marked(collection: str, path: Path) -> Path:
    """The path of a variable whose place in NNX a plan says."""
    return (_PLANNED, collection, *path)


def apply(plan: Plan, entries: Entries, value: Path) -> dict[Path, Any]:
    """The entries with what is marked in its place in NNX.

    Args:
      plan: The plan.
      entries: Entries by NNX paths, some marked.
      value: What the path of a Variable ends with.
    """
    result = {path: leaf for path, leaf in entries.items() if _PLANNED not in path}
    for prefix, variables in _groups(entries).items():
        tree = nest((path[: len(path) - len(value)], _leaf(v)) for path, v in variables.items())
        for path, leaf in _planned(plan.to_nnx, tree, prefix):
            result[(*prefix, *path, *value)] = leaf
    return result


def undo(plan: Plan, entries: Entries, wanted: Iterable[Path], value: Path) -> dict[Path, Any]:
    """The inverse of `apply`; ``wanted`` are the paths that are to be filled, some marked."""
    prefixes = dict.fromkeys(path[: path.index(_PLANNED)] for path in wanted if _PLANNED in path)
    result = dict(entries)
    # The innermost first: the model's own state may be the whole of what is left.
    for prefix in sorted(prefixes, key=len, reverse=True):
        inner = {path: leaf for path, leaf in result.items() if path[: len(prefix)] == prefix}
        for path in inner:
            del result[path]
        # NNX's lists have numbers as names, which a checkpoint keeps as text.
        tree = nest(
            (tuple(map(_name, path[len(prefix) : len(path) - len(value)])), _leaf(leaf))
            for path, leaf in inner.items()
        )
        for path, leaf in _planned(plan.to_linen, tree, prefix):
            result[(*prefix, _PLANNED, *path, *value)] = leaf
    return result


def _groups(entries: Entries) -> dict[Path, dict[Path, Any]]:
    groups: dict[Path, dict[Path, Any]] = {}
    for path, leaf in entries.items():
        if _PLANNED in path:
            place = path.index(_PLANNED)
            groups.setdefault(path[:place], {})[path[place + 1 :]] = leaf
    return groups


def _planned(
    convert: Callable[[Mapping[str, Any]], Mapping[str, Any]], tree: Mapping[str, Any], at: Path
) -> Iterator[tuple[Path, Any]]:
    try:
        converted = convert(tree)
    except ValueError as error:
        raise CheckpointError(f"the plan does not convert {written(at)}: {error}") from error
    # Metadata boxes are no part of what a checkpoint has.
    for path, leaf in flat(meta.unbox(converted)):
        yield path, None if is_empty(leaf) else leaf


def _leaf(leaf: Any) -> Any:
    return optax.MaskedNode() if is_empty(leaf) else loaded(leaf)


def _name(part: str | int) -> str | int:
    return int(part) if isinstance(part, str) and part.isdigit() else part

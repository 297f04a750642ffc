"""A checkpoint as its leaves by their paths, without the arrays.

What differs between file formats ends here: a checkpoint is a flat dict of paths and leaves. A path
is made of strings, the keys of dicts, and of integers, the places in lists. A leaf is a `Stored`
array, which is read when it is needed, a number, a string, an array in memory, or something empty.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Path = tuple[str | int, ...]
Entries = Mapping[Path, Any]


class CheckpointError(ValueError):
    """A checkpoint cannot be read, understood or written; the message says which part and why."""


class Reader(Protocol):
    """What reads the arrays of one checkpoint."""

    def read(self, arrays: Sequence[Stored]) -> list[Any]:
        """The arrays themselves."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """An array in a checkpoint.

    Attributes:
      reader: what reads it.
      path: where it is in its checkpoint.
      shape: its shape.
      dtype: its dtype.
      sharding: how it lies on devices, where the checkpoint says so.
      key: what else the reader needs to find it.
      numpy: whether it was saved as an array of NumPy or of JAX, where that is known.
    """

    reader: Reader
    path: Path
    shape: tuple[int, ...]
    dtype: Any
    sharding: Any = None
    key: Any = None
    numpy: bool | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def load(self) -> Any:
        """The array."""
        return self.reader.read([self])[0]


def first_line(error: Exception) -> str:
    """The first line of an error's message that says anything."""
    return next((line for line in str(error).splitlines() if line.strip()), "")


def is_empty(leaf: Any) -> bool:
    """Whether a leaf holds nothing: an `EmptyState`, a `MaskedNode`, an empty dict."""
    return leaf is None or (isinstance(leaf, dict | list | tuple) and not leaf)


def loaded(leaf: Any) -> Any:
    """A leaf in memory."""
    return leaf.load() if isinstance(leaf, Stored) else leaf


def read_all(leaves: Sequence[Any]) -> list[Any]:
    """The leaves in memory, those of one reader read together."""
    stored = [leaf for leaf in leaves if isinstance(leaf, Stored)]
    arrays: dict[int, Any] = {}
    for reader in {id(leaf.reader): leaf.reader for leaf in stored}.values():
        mine = [leaf for leaf in stored if leaf.reader is reader]
        arrays.update({id(s): a for s, a in zip(mine, reader.read(mine), strict=True)})
    return [arrays.get(id(leaf), leaf) for leaf in leaves]


def flat(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of nested dicts, lists and tuples, empty ones included."""
    if isinstance(tree, Mapping) and tree:
        items: Iterable[tuple[Any, Any]] = ((str(key), value) for key, value in tree.items())
    elif isinstance(tree, list | tuple) and tree:
        items = enumerate(tree)
    else:
        yield path, tree
        return
    for key, value in items:
        yield from flat(value, (*path, key))


def nested(entries: Entries) -> Any:
    """The tree of dicts and lists with these leaves: the inverse of `flat`.

    A place of a list that has no leaf is None.
    """
    if () in entries:
        return entries[()]
    children: dict[str | int, dict[Path, Any]] = {}
    for path, leaf in entries.items():
        children.setdefault(path[0], {})[path[1:]] = leaf
    if not all(isinstance(key, int) for key in children):
        return {str(key): nested(below) for key, below in children.items()}
    places = range(1 + max(key for key in children if isinstance(key, int)))
    return [nested(children[i]) if i in children else None for i in places]


def below(entries: Entries, root: Path) -> dict[Path, Any]:
    """The entries under ``root``, by their paths from there."""
    depth = len(root)
    return {path[depth:]: leaf for path, leaf in entries.items() if path[:depth] == root}


def written(path: Path) -> str:
    """A path as messages show it."""
    return "/".join(map(str, path)) or "the top level"


def listed(paths: Iterable[Path], limit: int = 8) -> str:
    """Paths as messages show them."""
    every = [written(path) for path in paths]
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more


def batches(arrays: Sequence[Any], limit: int, size: Callable[[Any], int]) -> Iterator[list[Any]]:
    """The arrays in groups of at most ``limit`` bytes; a larger array is a group of its own."""
    group: list[Any] = []
    total = 0
    for array in arrays:
        if group and total + size(array) > limit:
            yield group
            group, total = [], 0
        group.append(array)
        total += size(array)
    if group:
        yield group

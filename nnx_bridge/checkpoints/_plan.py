"""A plan of `nnx_bridge.match` on checkpoints: other names, other shapes, arrays joined and split.

The variables of a Linen model are marked, and so is everything that follows them, such as moments.
What a row of the plan makes of marked arrays is again an array that is read when it is needed: then
the row is converted, and what else comes out of it is kept for a while.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

from nnx_bridge.checkpoints._entries import (
    CheckpointError,
    Entries,
    Path,
    Stored,
    is_empty,
    listed,
    read_all,
    written,
)
from nnx_bridge.weights import Copy, Plan, Row

# Stands in a path in front of what belongs to a plan: a collection and the Linen path in it.
_PLANNED = "<plan>"
# Of arrays that came out of a row, but are not needed yet, so many bytes are kept; others are
# converted again.
_KEPT = 128 * 2**20

_Stream = Callable[[Callable[[Any], Any], Iterable[Row]], Iterator[tuple[Any, Any]]]


def marked(collection: str, path: Path) -> Path:
    """The path of a variable whose place in NNX a plan says."""
    return (_PLANNED, collection, *path)


def unmarked(plan: Plan | None, path: Path) -> Path:
    """A path for messages: of what is marked, its place in NNX, or in Linen if it has none."""
    if plan is None or _PLANNED not in path:
        return path
    at = path.index(_PLANNED)
    above, linen = path[:at], path[at + 1 :]
    places = (r.nnx[0] for r in plan.rows if r.nnx and {linen, linen[:-1]} & {*r.linen})
    return (*above, *next(places, linen))


def apply(plan: Plan, entries: Entries, value: Path, model: Path) -> dict[Path, Any]:
    """The entries with what is marked in its place in NNX.

    Args:
      plan: The plan.
      entries: Entries by NNX paths, some marked.
      value: What the path of a Variable ends with.
      model: Where the model stands; whole modules may be masked elsewhere, but not there.

    Raises:
      CheckpointError: What is marked is not what the plan was made for.
    """
    _check(plan)
    rows = _Rows()
    result = {path: leaf for path, leaf in entries.items() if _PLANNED not in path}
    for prefix, variables in _groups(entries).items():
        values = {path[: len(path) - len(value)]: leaf for path, leaf in variables.items()}
        _check_paths(plan, values, prefix == model)
        for row in plan.rows:
            if _present(row.linen, values, prefix):
                sources = {path: values[path] for path in row.linen}
                for path, leaf in rows.convert(plan.stream_to_nnx, row, sources, row.nnx, prefix):
                    result[(*prefix, *map(str, path), *value)] = leaf
    return result


def undo(plan: Plan, entries: Entries, wanted: Iterable[Path], value: Path) -> dict[Path, Any]:
    """The inverse of `apply`; ``wanted`` are the paths that are to be filled, some marked."""
    _check(plan)
    rows = _Rows()
    result, wanted = dict(entries), set(wanted)
    for prefix in {path[: path.index(_PLANNED)]: None for path in wanted if _PLANNED in path}:
        for row in plan.rows:
            places = {path: (*prefix, *map(str, path), *value) for path in row.nnx}
            targets = {path: (*prefix, _PLANNED, *path, *value) for path in row.linen}
            # What NNX has no place for comes from nowhere, so only where it is asked for.
            if not places and wanted.isdisjoint(targets.values()):
                continue
            if _present(list(places.values()), entries, ()):
                sources = {path: result.pop(place) for path, place in places.items()}
                for path, leaf in rows.convert(
                    plan.stream_to_linen, row, sources, row.linen, prefix
                ):
                    result[targets[path]] = leaf
    return result


def _check(plan: Plan) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"expected a plan of nnx_bridge.match, got {type(plan).__name__}")
    try:
        plan.check()
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _check_paths(plan: Plan, values: Entries, complete: bool) -> None:
    known = {leaf.path for leaf in plan.linen}
    collections = {path[0] for path in values}
    used = [path for row in plan.rows for path in row.linen if path[0] in collections]
    lacking = [path for path in used if path not in values] if complete else []
    unknown = [path for path in values if path not in known]
    if lacking:
        raise CheckpointError(f"the checkpoint lacks {listed(lacking)}, which the plan has")
    if unknown:
        raise CheckpointError(f"the plan has no {listed(unknown)}, which the checkpoint has")


def _groups(entries: Entries) -> dict[Path, dict[Path, Any]]:
    groups: dict[Path, dict[Path, Any]] = {}
    for path, leaf in entries.items():
        if _PLANNED in path:
            place = path.index(_PLANNED)
            groups.setdefault(path[:place], {})[path[place + 1 :]] = leaf
    return groups


def _present(paths: Sequence[Path], values: Entries, prefix: Path) -> bool:
    """Whether there is what a row takes; all of it or nothing must be."""
    lacking = [path for path in paths if path not in values]
    if lacking and len(lacking) < len(paths):
        names = listed((*prefix, *path) for path in lacking)
        raise CheckpointError(f"the checkpoint lacks {names}, which the plan takes together")
    return not lacking


@dataclasses.dataclass(frozen=True, eq=False)
class _Task:
    """One row of a plan, and what it is applied to."""

    stream: _Stream
    row: Row
    sources: Entries
    at: Path

    def run(self, leaves: Iterable[Any]) -> dict[Path, Any]:
        values = {
            path: optax.MaskedNode() if is_empty(leaf) else leaf
            for path, leaf in zip(self.sources, leaves, strict=True)
        }
        try:
            return dict(self.stream(values.__getitem__, [self.row]))
        except ValueError as error:
            where = written(self.at)
            raise CheckpointError(f"the plan does not convert {where}: {error}") from error


class _Rows:
    """Reads arrays by converting the rows that they come from."""

    def __init__(self) -> None:
        self._kept: dict[tuple[_Task, Path], Any] = {}
        # Orbax writes arrays of several kinds at once.
        self._lock = threading.Lock()

    def convert(
        self, stream: _Stream, row: Row, sources: Entries, targets: Iterable[Path], at: Path
    ) -> Iterator[tuple[Path, Any]]:
        """What a row makes of the sources, of which no array is read, with its paths."""
        task = _Task(stream, row, sources, at)
        if not row.nnx:
            # Nothing will be read of what NNX has no place for, but it must be looked at.
            yield from task.run(read_all(list(sources.values()))).items()
            return
        numpy = all(map(_from_numpy, sources.values()))
        made = task.run(map(_described, sources.values()))
        if isinstance(row.layout, Copy) and _same_dtypes(made.values(), sources.values()):
            # In the same order on both sides.
            yield from zip(targets, sources.values(), strict=True)
            return
        for path, leaf in made.items():
            if isinstance(leaf, jax.ShapeDtypeStruct):
                leaf = Stored(
                    self, (*at, *path), leaf.shape, leaf.dtype, key=(task, path), numpy=numpy
                )
            yield path, None if is_empty(leaf) else leaf

    def read(self, arrays: Sequence[Stored]) -> list[Any]:
        with self._lock:
            return [self._read(*array.key) for array in arrays]

    def _read(self, task: _Task, path: Path) -> Any:
        if (task, path) not in self._kept:
            made = task.run(read_all(list(task.sources.values())))
            self._kept.update({(task, path): value for path, value in made.items()})
        value = self._kept.pop((task, path))
        total = sum(kept.nbytes for kept in self._kept.values())
        while total > _KEPT:
            total -= self._kept.pop(next(iter(self._kept))).nbytes
        return value


def _described(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf


def _same_dtypes(ours: Iterable[Any], theirs: Iterable[Any]) -> bool:
    return all(
        getattr(a, "dtype", None) == getattr(b, "dtype", None)
        for a, b in zip(ours, theirs, strict=True)
    )


def _from_numpy(leaf: Any) -> bool:
    return leaf.numpy is True if isinstance(leaf, Stored) else isinstance(leaf, np.ndarray)

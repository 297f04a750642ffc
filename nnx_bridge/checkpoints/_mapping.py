"""Where each leaf of a Linen train state stands in an NNX one.

The map is made in one direction only. The way back is its inverse, over the structure that a Linen
checkpoint has: that of the one an NNX checkpoint was made from (which it remembers), or of one that
the caller names, or, with neither, the structure that NNX's own names suggest.

In the optimizer's state, and beside it, every tree that has the paths of the parameters follows
them: moments, traces, accumulated gradients, averages. What is masked in it (an empty place where a
parameter would be) is an empty Variable in NNX; all other empty places are nothing there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from nnx_bridge._names import linen_names, located
from nnx_bridge.checkpoints._entries import (
    CheckpointError,
    Entries,
    Path,
    below,
    is_empty,
    listed,
    loaded,
    written,
)
from nnx_bridge.checkpoints._layout import Linen, Nnx, is_apart
from nnx_bridge.checkpoints._names import VALUE, Names, unboxed
from nnx_bridge.checkpoints._plan import undo, unmarked
from nnx_bridge.weights import Plan

# Paths under this are kept apart from the rest.
RNGS = "rngs"


def to_nnx(
    entries: Entries, layout: Linen, planned: bool = False
) -> tuple[dict[Path, Path | None], Nnx]:
    """The NNX path of each leaf of a Linen checkpoint, None for what has no place in NNX.

    Args:
      entries: The checkpoint.
      layout: Its layout.
      planned: Whether a plan says where variables are in NNX; their paths are marked then.

    Returns:
      The paths, and the layout that they make.

    Raises:
      CheckpointError: Two leaves would have one path.
    """
    names = Names(entries, layout, planned)
    rest = [p for p in entries if not _in_collections(p, layout)]
    random = {p for p in rest if is_apart(p, entries[p], layout)}
    bare = layout.opt_state is None and layout.step is None and not set(rest) - random
    model: Path = () if bare else ("model",)
    where: dict[Path, Path | None] = {p: (RNGS, *map(str, p)) for p in random}
    for collection, root in layout.collections.items():
        inner = {p: leaf for p, leaf in below(entries, root).items() if p}
        variable_of = unboxed(inner)
        for p, leaf in inner.items():
            target = names.of[collection].get(variable_of[p])
            where[(*root, *p)] = None if target is None or is_empty(leaf) else (*model, *target)
    optimizer = None if layout.opt_state is None else ("optimizer",)
    for p in rest:
        if p == layout.step and optimizer:
            where[p] = (*optimizer, "step", VALUE)
    remaining = {p: entries[p] for p in rest if p not in where}
    root = layout.root
    for field in dict.fromkeys(_field(p, root) for p in remaining):
        inside = field[: len(root)] == root
        prefix: Path = tuple(map(str, field[len(root) :] if inside else field))
        suffix: Path = ()
        if field == layout.opt_state:
            prefix, suffix = ("optimizer", "opt_state"), (VALUE,)
        for p, target in _follow(below(remaining, field), names, suffix).items():
            where[(*field, *p)] = None if target is None else (*prefix, *target)
    _check_unique(where)
    return where, Nnx("nnx_model" if bare else "nnx_train_state", model, optimizer)


def _in_collections(path: Path, layout: Linen) -> bool:
    return any(path[: len(root)] == root for root in layout.collections.values())


def _field(path: Path, root: Path) -> Path:
    """The field of the train state, or the thing beside it, that a leaf belongs to."""
    return path[: len(root) + 1] if path[: len(root)] == root else path[:1]


def _follow(entries: Entries, names: Names, suffix: Path) -> dict[Path, Path | None]:
    """The NNX paths below a field, in which some trees follow the parameters."""
    if () in entries:
        return {(): None if is_empty(entries[()]) else suffix}
    for collection in ("params", *(c for c in names.of if c != "params")):
        followed = _like_collection(entries, names.of[collection])
        if followed is not None:
            return followed
    where: dict[Path, Path | None] = {}
    inside: dict[str | int, dict[Path, Any]] = {}
    for path, leaf in entries.items():
        inside.setdefault(path[0], {})[path[1:]] = leaf
    for key, inner in inside.items():
        # An optimizer of `{'params': ...}` has that level in its moments, NNX's has not. Beside a
        # count it is the name of a field.
        alone = key == "params" and inside.keys() <= names.of.keys()
        level: Path = () if alone and _is_followed(inner, names) else (str(key),)
        for p, target in _follow(inner, names, suffix).items():
            where[(key, *p)] = None if target is None else (*level, *target)
    return where


def _is_followed(entries: Entries, names: Names) -> bool:
    return _like_collection(entries, names.of["params"]) is not None


def _like_collection(
    entries: Entries, names: Mapping[Path, Path]
) -> dict[Path, Path | None] | None:
    """The NNX paths of a tree that has the paths of a collection; None for any other tree."""
    if not names or not entries or () in entries:
        return None
    where: dict[Path, Path | None] = {}
    covered: set[Path] = set()
    empty: list[Path] = []
    variable_of = unboxed(entries)
    for path, leaf in entries.items():
        variable = variable_of[path]
        # An optimizer may keep several arrays for one, in a list.
        end = len(variable)
        while variable[:end] not in names and end and isinstance(variable[end - 1], int):
            end -= 1
        if variable[:end] in names:
            covered.add(variable[:end])
            where[path] = (*names[variable[:end]], *variable[end:])
        elif is_empty(leaf):
            # A whole submodule that is masked, or a module without variables.
            empty.append(path)
            where[path] = None
        else:
            return None
    masked = set(empty)
    left = (name for name in names if name not in covered)
    complete = all(any(name[:i] in masked for i in range(1, len(name))) for name in left)
    return where if complete else None


def _check_unique(where: Mapping[Path, Path | None]) -> None:
    seen: dict[Path, Path] = {}
    for path, target in where.items():
        if target is None:
            continue
        if target in seen:
            both = f"{written(path)} and {written(seen[target])}"
            raise CheckpointError(f"{both} would both be {written(target)} in NNX")
        seen[target] = path


def suggested(entries: Entries, layout: Nnx) -> tuple[dict[Path, Any], Linen]:
    """The structure of a Linen train state, as the names in an NNX one suggest it.

    A checkpoint does not keep the types of Variables. What has a place in the optimizer's state is
    a parameter; of the rest, what BatchNorm calls `mean` and `var` are its statistics, what an
    attention layer calls `cached_...` is its cache, and all else are parameters. Empty places at
    the end of an optimizer's tuples are not known.
    """
    structure: dict[Path, Any] = {}
    collections: dict[str, Path] = {"params": ("params",)}
    kept = {p: leaf for p, leaf in entries.items() if not is_apart(p, leaf, layout)}
    optimized = _suffixes(below(kept, layout.optimizer)) if layout.optimizer else set()
    for path, leaf in _variables(below(kept, layout.model)).items():
        collection = "params" if path in optimized else _collection(path)
        collections[collection] = (collection,)
        structure[(collection, *linen_names(path))] = leaf
    if layout.model:
        beside = {p: leaf for p, leaf in kept.items() if p[0] != layout.model[0]}
        for field in dict.fromkeys(p[0] for p in beside):
            root: Path = () if (field,) == layout.optimizer else (str(field),)
            for path, leaf in _variables(below(beside, (field,))).items():
                structure[(*root, *linen_names(path))] = leaf
    if layout.optimizer is None:
        return structure, Linen("variables", collections)
    structure = {_listed(p, structure): leaf for p, leaf in structure.items()}
    structure[("step",)] = np.zeros((), np.int32)
    return structure, Linen("train_state", collections, ("opt_state",), ("step",))


def _suffixes(entries: Entries) -> set[Path]:
    return {path[i:] for path in _variables(entries) for i in range(1, len(path))}


def _variables(entries: Entries) -> dict[Path, Any]:
    """The leaves by the paths of their Variables, where all of them are in Variables."""
    if all(path and path[-1] == VALUE for path in entries):
        return {path[:-1]: leaf for path, leaf in entries.items()}
    return dict(entries)


def _collection(path: Path) -> str:
    if path[-1] in ("mean", "var"):
        return "batch_stats"
    return "cache" if str(path[-1]).startswith(("cached_", "cache_")) else "params"


def _listed(path: Path, structure: Entries) -> Path:
    """The path in the optimizer's state, where NNX has numbers as names for Optax's tuples."""
    if path[:1] != ("opt_state",):
        return path
    parameters = {p[1:] for p in structure if p[0] == "params"}
    for i in range(len(path)):
        if path[i:] in parameters:
            return (*map(_place, path[:i]), *path[i:])
    return tuple(map(_place, path))


def _place(part: str | int) -> str | int:
    return int(part) if isinstance(part, str) and part.isdigit() else part


def as_step(step: Any, like: Any) -> Any:
    """The step in the type of ``like``: NNX counts in uint32, Linen in Python or in int32."""
    if isinstance(like, int | float) and not isinstance(like, bool):
        return type(like)(step)
    counted = np.asarray(step).astype(like.dtype)
    # Without 64 bits JAX cannot hold what NumPy can.
    return counted if counted.itemsize > 4 else jax.numpy.asarray(counted)


def to_linen(
    entries: Entries, layout: Nnx, structure: Entries, linen: Linen, plan: Plan | None = None
) -> dict[Path, Any]:
    """The leaves of an NNX checkpoint at their places in a Linen structure.

    Raises:
      CheckpointError: The two do not have the same leaves; the message lists the differences.
    """
    where, made = to_nnx(structure, linen, plan is not None)
    renamed = {p: _as_saved(target, made, layout) for p, target in where.items() if target}
    wanted = {p: t for p, t in renamed.items() if t[0] != RNGS}
    # What looks like random numbers may be a variable of such a name.
    known = set(wanted.values())
    entries = {
        p: leaf for p, leaf in entries.items() if p in known or not is_apart(p, leaf, layout)
    }
    if plan is not None:
        entries = undo(plan, entries, wanted.values(), () if layout.pure else (VALUE,))
    have = set(entries)
    wanted = {p: located(t, have) for p, t in wanted.items()}
    # Whether something empty has a Variable depends on how the mask was written.
    lacking = [t for p, t in wanted.items() if t not in have and not is_empty(structure[p])]
    left = [p for p in have - set(wanted.values()) if not is_empty(entries[p])]
    if lacking or left:
        lacking = list(dict.fromkeys(unmarked(plan, path) for path in lacking))
        parts = [
            f"the NNX checkpoint lacks {listed(sorted(lacking, key=written))}" if lacking else "",
            f"the Linen structure has no place for {listed(sorted(left, key=written))}"
            if left
            else "",
        ]
        raise CheckpointError("; ".join(part for part in parts if part))
    result = {
        p: leaf if is_empty(leaf) else entries[wanted[p]]
        for p, leaf in structure.items()
        if p in wanted or is_empty(leaf)
    }
    if linen.step in result:
        result[linen.step] = as_step(loaded(result[linen.step]), structure[linen.step])
    return result


def _as_saved(target: Path, made: Nnx, layout: Nnx) -> Path:
    """A path of the layout that `to_nnx` makes as a path of the layout that was found."""
    if target[0] == RNGS:
        return target
    in_variable = target[-1] == VALUE
    if made.optimizer and layout.optimizer and target[:1] == made.optimizer:
        target = (*layout.optimizer, *target[1:])
    elif target[: len(made.model)] == made.model:
        target = (*layout.model, *target[len(made.model) :])
    return target[:-1] if layout.pure and in_variable else target

"""What keeps a plan from being applied."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lifted._errors import path_text
from nnx_bridge._collections import Path
from nnx_bridge.weights._layouts import Copy
from nnx_bridge.weights._leaves import OPTIONAL, Leaf
from nnx_bridge.weights._row import Row

if TYPE_CHECKING:
    from nnx_bridge.weights._plan import Plan

# So many names, and so many lines, a message shows at most.
_NAMES = 3
_LINES = 40
_PATHS = 8
_COMPARED = 50


class WeightsError(ValueError):
    """Weights do not fit: the message lists each path, what was expected, and what came."""


class Kind(enum.Enum):
    """What is wrong."""

    AMBIGUOUS = "ambiguous"
    MISSING = "missing"
    EXTRA = "extra"
    SHAPE = "shape"
    DTYPE = "dtype"
    TWICE = "twice"
    UNKNOWN = "unknown path"
    AXES = "names of axes"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a plan.

    Attributes:
      kind: What it is.
      paths: The paths that are concerned, of Linen or of NNX.
      text: The message.
    """

    kind: Kind
    paths: tuple[Path, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class Undecided:
    """Arrays whose partners are not known.

    Attributes:
      linen: Paths in Linen.
      nnx: The candidates for them, paths in NNX.
      why: What was missing to decide, and what to do.
    """

    linen: tuple[Path, ...]
    nnx: tuple[Path, ...]
    why: str


def listed(texts: Iterable[str], count: int) -> str:
    """Lines of a message; of very many, the first ones, and only these are made."""
    more = [f"... and {count - _LINES} more"] if count > _LINES else []
    return "".join(f"\n  {text}" for text in [*itertools.islice(texts, _LINES), *more])


def nearest(path: Path, known: Iterable[Path]) -> str:
    """The known paths that are most like one, for the end of a message."""
    text = path_text(path)
    names = difflib.get_close_matches(text, [path_text(k) for k in known], n=3, cutoff=0.4)
    return f"; nearest: {', '.join(names)}" if names else ""


def allowed(path: Path, patterns: Iterable[str]) -> bool:
    """Whether a path, with or without its first part, or a module above it matches a pattern.

    Example:
        >>> allowed(("params", "head", "kernel"), ["head"]), allowed(("a", "b"), ["a/*"])
        (True, True)
    """
    texts = {
        path_text(path[start:end]) for start in (0, 1) for end in range(start + 1, len(path) + 1)
    }
    return any(fnmatchcase(text, pattern) for text in texts for pattern in patterns)


def find_problems(plan: Plan) -> Iterator[Problem]:
    """What is wrong with a plan, from its rows and from what there is on both sides."""
    linen = {leaf.path: leaf for leaf in plan.linen}
    nnx = {leaf.path: leaf for leaf in plan.nnx}
    used_linen = Counter(path for row in plan.rows for path in row.linen)
    used_nnx = Counter(path for row in plan.rows for path in row.nnx)
    undecided = {path for a in plan.undecided for path in (*a.linen, *a.nnx)}
    undecided -= used_linen.keys() | used_nnx.keys()
    for group in plan.undecided:
        if undecided & {*group.linen, *group.nnx}:
            yield _ambiguous(group)
    for row in plan.rows:
        yield from _of_row(row, linen, nnx, plan.cast)
    for side, used in (("Linen", used_linen), ("NNX", used_nnx)):
        for path, times in used.items():
            if times > 1:
                text = (
                    f"{path_text(path)}: {times} rows have it on the side of {side}, expected one"
                )
                yield Problem(Kind.TWICE, (path,), text)
    free_linen = [leaf for leaf in plan.linen if leaf.path not in used_linen]
    free_nnx = [t for t in plan.nnx if t.path not in used_nnx and t.path not in undecided]
    of_linen = {leaf.collection for leaf in plan.linen}
    free_nnx = [
        target
        for target in free_nnx
        if target.required and (target.collection not in OPTIONAL or target.collection in of_linen)
    ]
    candidates = _Candidates(free_linen)
    for target in free_nnx:
        if not allowed(target.path, plan.allow_missing):
            text = (
                f"{path_text(target.path)}: expected {target}, nothing in Linen was found for it"
                f"{candidates(target)}; allow_missing=[{path_text(target.path)!r}] lets it be"
            )
            yield Problem(Kind.MISSING, (target.path,), text)
    candidates = _Candidates(free_nnx)
    for leaf in free_linen:
        if leaf.path not in undecided and not allowed(leaf.path, plan.allow_extra):
            text = (
                f"{path_text(leaf.path)}: came {leaf}, nothing in the model was found for it"
                f"{candidates(leaf)}; allow_extra=[{path_text(leaf.path)!r}] leaves it behind"
            )
            yield Problem(Kind.EXTRA, (leaf.path,), text)


class _Candidates:
    """What an array might be meant for, among those that nobody has."""

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._by_shape: dict[Any, list[Leaf]] = defaultdict(list)
        self._leaves = leaves
        for leaf in leaves:
            self._by_shape[leaf.shape].append(leaf)

    def __call__(self, leaf: Leaf) -> str:
        same = self._by_shape.get(leaf.shape)
        # The nearest of very many names would take too long to find.
        others = (same or self._leaves)[:_COMPARED]
        if not others:
            return ""
        texts = {path_text(other.path): other for other in others}
        names = difflib.get_close_matches(path_text(leaf.path), texts, n=_NAMES, cutoff=0.0)
        what = "of this shape, without a partner" if same else "without a partner"
        return f" ({what}: {', '.join(f'{name} {texts[name]}' for name in names)})"


def _ambiguous(group: Undecided) -> Problem:
    ours, theirs = _few(group.linen), _few(group.nnx)
    text = f"{ours}: the candidates in NNX are {theirs}; {group.why}"
    return Problem(Kind.AMBIGUOUS, (*group.linen, *group.nnx), text)


def _few(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _PATHS} more" if len(paths) > _PATHS else ""
    return ", ".join(map(path_text, paths[:_PATHS])) + more


def _of_row(
    row: Row, linen: dict[Path, Any], nnx: dict[Path, Any], cast: tuple[str, ...]
) -> Iterator[Problem]:
    unknown = [(p, "Linen", linen) for p in row.linen if p not in linen]
    unknown += [(p, "NNX", nnx) for p in row.nnx if p not in nnx]
    for path, side, known in unknown:
        text = f"{path_text(path)}: not a path in {side}{nearest(path, known)}"
        yield Problem(Kind.UNKNOWN, (path,), text)
    if unknown:
        return
    came: list[Any] = [linen[path] for path in row.linen]
    if not isinstance(row.layout, Copy):
        try:
            arrays = row.to_nnx([leaf.abstract for leaf in came])
            if len(arrays) != len(row.nnx):
                raise ValueError(f"{len(arrays)} arrays for {len(row.nnx)} paths in NNX")
        except (ValueError, TypeError) as error:
            yield Problem(Kind.SHAPE, row.linen, f"{row.text}: {error}")
            return
        came = [Leaf(p, tuple(x.shape), str(x.dtype)) for p, x in zip(row.nnx, arrays, strict=True)]
    for path, leaf in zip(row.nnx, came, strict=True):
        want = nnx[path]
        where = f"{', '.join(map(path_text, row.linen))} -> {path_text(path)}"
        if want.shape != leaf.shape:
            text = f"{where}: expected {want}, came {leaf}{_hint(want.shape, leaf.shape)}"
            yield Problem(Kind.SHAPE, (path,), text)
        elif want.dtype != leaf.dtype and not allowed(path, cast):
            text = f"{where}: expected {want}, came {leaf}; cast=[{path_text(path)!r}] converts it"
            yield Problem(Kind.DTYPE, (path,), text)
    names = row.names([linen[path].names for path in row.linen])
    for path, ours in zip(row.nnx, names, strict=True):
        theirs = nnx[path].names
        if ours is not None and theirs is not None and _permuted(ours, theirs):
            text = (
                f"{path_text(path)}: the axes are {theirs} in the model and {ours} in Linen, in "
                "another order; write a rule with the layout, or name them alike"
            )
            yield Problem(Kind.AXES, (path,), text)


def _hint(want: Any, came: Any) -> str:
    if want is not None and came is not None and len(want) > 1 and want == came[::-1]:
        return "; a rule with the layout Transpose() turns it around"
    return ""


def _permuted(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> bool:
    return ours != theirs and sorted(map(str, ours)) == sorted(map(str, theirs))


def cast_to(value: Any, dtype: str) -> Any:
    """A value with another dtype, where it has one."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, dtype)
    return value.astype(np.dtype(dtype)) if hasattr(value, "astype") else value

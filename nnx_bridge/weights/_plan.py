"""The plan of a migration: which arrays of Linen are which of NNX. It converts any tree of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
from rich.console import RenderableType

from lifted._errors import is_array, path_text
from nnx_bridge._collections import Path, Variables, nest
from nnx_bridge.weights import _plan_json, _plan_table
from nnx_bridge.weights._leaves import (
    Leaf,
    Target,
    linen_leaves,
    linen_values,
    nnx_leaves,
    nnx_values,
    unboxed,
)
from nnx_bridge.weights._problems import (
    Problem,
    Undecided,
    WeightsError,
    cast_to,
    find_problems,
    listed,
    nearest,
)
from nnx_bridge.weights._row import Row


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which arrays of Linen variables are which of an NNX model, as `match` proposes it.

    `rich.print(plan)` shows it as a table. A plan is not changed: `replace` gives an edited one,
    and so does the file between `save` and `read`.

    Attributes:
      rows: What belongs together.
      linen: The arrays of Linen.
      nnx: The arrays of NNX.
      undecided: What could not be decided.
      ignored: Paths in NNX that are no weights: RNG state, what was captured.
      allow_missing: Patterns of paths in NNX that may stay as they are.
      allow_extra: Patterns of paths in Linen that may be left behind.
      cast: Patterns of paths in NNX whose arrays may change their dtype to that of the model.

    Example:
        >>> from flax import linen as nn, nnx
        >>> from nnx_bridge import match
        >>> variables = nn.Dense(3).init(jax.random.key(0), np.ones((1, 2)))
        >>> plan = match(variables, nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> plan.to_nnx(variables)["kernel"].shape
        (2, 3)
    """

    rows: tuple[Row, ...]
    linen: tuple[Leaf, ...]
    nnx: tuple[Target, ...]
    undecided: tuple[Undecided, ...] = ()
    ignored: tuple[Path, ...] = ()
    allow_missing: tuple[str, ...] = ()
    allow_extra: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()

    @functools.cached_property
    def problems(self) -> tuple[Problem, ...]:
        """Everything that keeps the plan from being applied."""
        return tuple(find_problems(self))

    def check(self) -> None:
        """Raises WeightsError with all `problems`, if there are any."""
        if self.problems:
            texts = listed((problem.text for problem in self.problems), len(self.problems))
            heading = f"the plan cannot be applied, {len(self.problems)} problem(s):"
            raise WeightsError(f"{heading}{texts}{self._without_collection()}")

    def _without_collection(self) -> str:
        """A line that says so, where Linen's side are parameters alone."""
        ours = {leaf.collection for leaf in self.linen}
        if not ours or ours & {"params", *(target.collection for target in self.nnx)}:
            return ""
        return (
            f"\nThe Linen variables have no collection that the model knows, but "
            f"{', '.join(sorted(ours)[:8])}: parameters alone are written {{'params': parameters}}."
        )

    def check_models(self, variables: Variables, model: Any, *, but: Collection[str] = ()) -> None:
        """Raises WeightsError where variables or model are not what the plan was made for.

        Args:
          variables: Linen variables.
          model: An NNX model.
          but: Collections that are not looked at.
        """
        sides = (
            ("Linen", linen_leaves(variables), self.linen),
            ("NNX", nnx_leaves(model, {leaf.collection for leaf in self.linen})[0], self.nnx),
        )
        wrong = []
        for side, came, planned in sides:
            here, there = (
                {leaf.path: str(leaf) for leaf in leaves if leaf.collection not in but}
                for leaves in (came, planned)
            )
            wrong += [
                f"{side}, {path_text(path)}: the plan has {there.get(path, 'nothing')}, came "
                f"{here.get(path, 'nothing')}"
                for path in {**there, **here}
                if here.get(path) != there.get(path)
            ]
        if wrong:
            raise WeightsError(f"the plan was made for other models:{listed(wrong, len(wrong))}")

    def replace(self, **changes: Any) -> Plan:
        """The plan with other fields, such as `rows`."""
        return dataclasses.replace(self, **changes)

    def to_nnx(self, variables: Variables) -> dict[Any, Any]:
        """Converts a tree of the structure of the Linen variables.

        That may be the variables, or moments of an optimizer (`{"params": mu}`), NumPy arrays,
        `jax.ShapeDtypeStruct`, or anything else in the place of arrays that are only copied. Boxes
        are opened. What has no array at its leaves, such as `optax.MaskedNode()`, is kept.

        What `cast` allows gets the dtype of the other side, and so do moments of that dtype.

        Args:
          variables: Nested dicts by collection. Collections may be left out as a whole.

        Returns:
          Nested dicts of values, at the paths of `nnx.to_flat_state`.

        Raises:
          WeightsError: The plan has problems, or the variables do not have its structure.
        """
        values = {path: unboxed(value)[0] for path, value in linen_values(variables)}
        present = {path[0] for path in values}
        self._check_paths("Linen", values, present)
        rows = (row for row in self.rows if row.linen[0][0] in present)
        return nest(self.stream_to_nnx(values.__getitem__, rows))

    def to_linen(self, tree: Any, *, boxed: bool = True) -> dict[str, Any]:
        """Converts back: an NNX model, its state, or nested dicts as of `to_nnx`.

        Args:
          tree: With all weights of the plan; or without all those that are of some collection.
          boxed: Puts values into the metadata boxes that the Linen variables had.

        Returns:
          Linen variables; without what `allow_extra` has left behind.

        Raises:
          WeightsError: The plan has problems, or the tree does not have its structure.
        """
        values = nnx_values(tree)
        collections = {leaf.path: leaf.collection for leaf in self.nnx}
        # A row goes by the collection of its Linen side; a bare array has none of its own.
        collections |= {path: row.linen[0][0] for row in self.rows for path in row.nnx}
        ignored = set(self.ignored)
        values = {path: value for path, value in values.items() if path not in ignored}
        present = {collections[path] for path in values if path in collections}
        self._check_paths("NNX", values, present)
        rows = [row for row in self.rows if row.linen[0][0] in present]
        pairs = dict(self.stream_to_linen(values.__getitem__, rows))
        if any(isinstance(value, jax.ShapeDtypeStruct) for value in values.values()):
            pairs = {path: _described(value) for path, value in pairs.items()}
        boxes = {leaf.path: leaf.box for leaf in self.linen if leaf.box is not None and boxed}
        order = [leaf.path for leaf in self.linen if leaf.path in pairs]
        return nest(
            (path, jax.tree.unflatten(boxes[path], [pairs[path]]) if path in boxes else pairs[path])
            for path in order
        )

    def stream_to_nnx(
        self, read: Callable[[Path], Any], rows: Iterable[Row] | None = None
    ) -> Iterator[tuple[Path, Any]]:
        """Converts row by row, so that no more than the arrays of one row are needed at a time.

        Args:
          read: Returns the Linen value at a path `(collection, *modules, name)`, without its box.
          rows: Those to convert, all by default.

        Yields:
          Paths in NNX and their values.
        """
        self.check()
        for row in self.rows if rows is None else rows:
            values = _converted(row, row.linen, read, row.to_nnx)
            ours, theirs = self._dtypes(row)
            yield from zip(row.nnx, (_cast(v, ours, theirs) for v in values), strict=True)

    def stream_to_linen(
        self, read: Callable[[Path], Any], rows: Iterable[Row] | None = None
    ) -> Iterator[tuple[Path, Any]]:
        """The inverse of `stream_to_nnx`: paths in Linen and their values, without boxes."""
        self.check()
        for row in self.rows if rows is None else rows:
            values = _converted(row, row.nnx, read, row.to_linen)
            ours, theirs = self._dtypes(row)
            yield from zip(row.linen, (_cast(v, theirs, ours) for v in values), strict=True)

    def _dtypes(self, row: Row) -> tuple[str, str]:
        """The dtypes of a row on both sides, which differ where `cast` lets them."""
        linen, nnx = self._dtype_of
        ours = linen[row.linen[0]]
        return ours, nnx[row.nnx[0]] if row.nnx else ours

    @functools.cached_property
    def _dtype_of(self) -> tuple[dict[Path, str], dict[Path, str]]:
        linen, nnx = ({leaf.path: leaf.dtype for leaf in side} for side in (self.linen, self.nnx))
        return linen, nnx

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON data."""
        return _plan_json.to_json(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`.

        Raises:
          ValueError: The data is no plan.
        """
        return _plan_json.from_json(cls, data)

    def save(self, file: str | FilePath) -> None:
        """Writes the plan as JSON, one row a line, to be read, edited and kept with the code."""
        FilePath(file).write_text(_plan_json.dumps(self), encoding="utf-8")

    @classmethod
    def read(cls, file: str | FilePath) -> Plan:
        """Reads what `save` has written.

        Raises:
          ValueError: The file holds no plan.
        """
        return _plan_json.loads(cls, FilePath(file).read_text(encoding="utf-8"), str(file))

    def __rich__(self) -> RenderableType:
        return _plan_table.table(self)

    def _check_paths(self, side: str, values: Mapping[Path, Any], present: set[str]) -> None:
        self.check()
        used = [
            (p, r.linen[0][0]) for r in self.rows for p in (r.linen if side == "Linen" else r.nnx)
        ]
        known = {leaf.path for leaf in (self.linen if side == "Linen" else self.nnx)}
        missing = [
            path for path, collection in used if collection in present and path not in values
        ]
        unknown = [path for path in values if path not in known]
        if missing or unknown:
            wrong: list[tuple[str, Path, Iterable[Path]]]
            wrong = [("missing", path, values) for path in missing]
            wrong += [("not in the plan", path, known) for path in unknown]
            texts = (f"{what}: {path_text(p)}{nearest(p, near)}" for what, p, near in wrong)
            raise WeightsError(
                f"the {side} tree is not that of the plan:{listed(texts, len(wrong))}"
            )


def _converted(
    row: Row, paths: Iterable[Path], read: Callable[[Path], Any], convert: Callable[..., list[Any]]
) -> list[Any]:
    try:
        return convert([read(path) for path in paths])
    except (ValueError, TypeError) as error:  # JAX and NumPy say it in both ways.
        raise WeightsError(f"{row.text}: {error}") from error


def _cast(value: Any, came: str, wanted: str) -> Any:
    """A value in the dtype of the other side, if it has that of its own; moments may not."""
    if came == wanted or str(getattr(value, "dtype", wanted)) != came:
        return value
    return cast_to(value, wanted)


def _described(value: Any) -> Any:
    if not is_array(value) or isinstance(value, jax.ShapeDtypeStruct):
        return value
    return jax.ShapeDtypeStruct(np.shape(value), np.asarray(value).dtype)

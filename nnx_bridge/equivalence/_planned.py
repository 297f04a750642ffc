"""The plan by which a model was loaded, as what says which variable stands for which."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lifted._errors import path_text
from nnx_bridge._collections import Path, Variables, flatten, nest
from nnx_bridge.equivalence._correspondence import Problematic, normal
from nnx_bridge.weights import Absent, Plan, Row
from nnx_bridge.weights._problems import cast_to


class Planned:
    """A `Correspondence` of the rows of a plan: names, layouts, stacks.

    Args:
      plan: The plan, which fits both models and has no problems.
      places: Where the variables of the model stand among those that are compared, by their paths
        in the model.
    """

    def __init__(self, plan: Plan, places: Mapping[Path, Path]) -> None:
        self._plan, self._places = plan, places
        self.problems: list[Problematic] = []
        self._rows: list[Row] = []
        for row in plan.rows:
            reason = self._why_not(row)
            if reason:
                self.problems.extend(self._missing(row, reason))
            else:
                self._rows.append(row)
        self._modules = _modules(plan.rows)

    def to_model(self, variables: Variables) -> dict[str, Any]:
        values = dict(flatten(variables))
        rows = [row for row in self._rows if all(path in values for path in row.linen)]
        converted = self._plan.stream_to_nnx(values.__getitem__, rows)
        dtypes = {leaf.path: leaf.dtype for leaf in self._plan.nnx}
        return nest(
            (self._places[path], self._cast(value, path, dtypes)) for path, value in converted
        )

    def to_reference(self, variables: Variables) -> dict[str, Any]:
        held = dict(flatten(variables))
        values = {path: held[place] for path, place in self._places.items() if place in held}
        rows = [row for row in self._rows if all(path in values for path in row.nnx)]
        converted = self._plan.stream_to_linen(values.__getitem__, rows)
        dtypes = {leaf.path: leaf.dtype for leaf in self._plan.linen}
        return nest((path, self._cast(value, path, dtypes)) for path, value in converted)

    def module(self, path: str) -> str:
        if path not in self._modules:
            # It holds no weights, so that the plan says nothing of it.
            return normal(path)
        partner = self._modules[path]
        # No module of the reference has a name like this.
        return f"{path} of the model" if partner is None else partner

    def _cast(self, value: Any, path: Path, dtypes: Mapping[Path, str]) -> Any:
        """The value in the dtype of its side, where `cast` allows the sides to differ."""
        if not self._plan.cast or str(getattr(value, "dtype", dtypes[path])) == dtypes[path]:
            return value
        return cast_to(value, dtypes[path])

    def _why_not(self, row: Row) -> str:
        if isinstance(row.layout, Absent):
            return f"the model has none; {row.layout.reason}"
        bare = [path_text(path) for path in row.nnx if path not in self._places]
        return f"the model has it in no Variable, at {', '.join(bare)}" if bare else ""

    def _missing(self, row: Row, reason: str) -> Iterable[Problematic]:
        leaves = {leaf.path: leaf for leaf in self._plan.linen}
        for path in row.linen:
            leaf = leaves[path]
            yield Problematic(path_text(path), leaf.shape or (), leaf.dtype, True, False, reason)


def _modules(rows: Sequence[Row]) -> dict[str, str | None]:
    """The modules of the model that hold weights, with their partners in the reference or None.

    A module is held against the innermost one that holds all its weights. They are partners if they
    have the same name; or if both hold arrays themselves, and the same ones. Of others it is not
    certain that they compute the same: a rewrite may draw the line between two modules elsewhere,
    such as behind a residual.
    """
    pairs = [(q[:-1], p[1:-1]) for row in rows for p in row.linen for q in row.nnx]
    ours, theirs = _innermost(pairs), _innermost((b, a) for a, b in pairs)
    direct = set(pairs)
    found: dict[str, str | None] = {}
    for model, reference in ours.items():
        names = path_text(model), path_text(reference)
        own = (model, reference) in direct and theirs[reference] == model
        found[names[0]] = names[1] if own or normal(names[0]) == normal(names[1]) else None
    return {**found, "": ""}


def _innermost(pairs: Iterable[tuple[Path, Path]]) -> dict[Path, Path]:
    """For each module the longest path that all its partners, and those in it, have in common."""
    found: dict[Path, Path] = {}
    for path, partner in pairs:
        for end in range(len(path) + 1):
            known = found.get(path[:end], partner)
            both = zip(known, partner, strict=False)
            same = list(itertools.takewhile(lambda keys: keys[0] == keys[1], both))
            found[path[:end]] = known[: len(same)]
    return found

"""One lifted call: the Variables of the targets taken apart by a `Plan`, and put together again.

lifting = Lifting(plan, mdl, metadata_params)
inputs = Inputs(lifting, size)             # what goes along an axis, what is carried, ...
step = inputs.step(slices, carried)        # inside, with the arrays of one step
with step.opened() as (mdl, take):
    y = fn(mdl, *args)
    written = take()                       # what comes out along an axis, what does not
lifting.publish(written.form, axes, kept)  # outside, with the arrays of all steps
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lifted._errors import Path, path_text
from nnx_bridge import _flax_private
from nnx_bridge.functional import NNXGroup, NNXUpdates, Old
from nnx_bridge.transforms._arguments import axis_size
from nnx_bridge.transforms._metadata import axis_added
from nnx_bridge.transforms._plan import Kept, Plan, Where
from nnx_bridge.transforms._targets import functionalized, is_recorded

Axes = dict[int, list[Any]]
Key = (
    Any  # Hashable: the number of a part among the inputs; for a new one its path and number there.
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A Variable as the function left it, without its arrays.

    Attributes:
      path: of the Variable.
      treedef: its structure.
      sources: for each array an `Old`, or where to find it: ``('input', number)``,
        ``('kept', key)``, or its axis and its number there.
      axis: along which its arrays come out, if so.
    """

    path: Path
    treedef: Any
    sources: list[Any]
    axis: Where | None


@dataclasses.dataclass(frozen=True)
class Form:
    """What has come out of a lifted call, without the arrays.

    Attributes:
      leaves: what was written.
      regraphed: whether the graph of the targets has changed.
      close: makes updates of the leaves.
    """

    leaves: list[Leaf]
    regraphed: bool
    close: Callable[[list[Any]], NNXUpdates]


class Lifting:
    """The targets of one call."""

    def __init__(self, plan: Plan, mdl: Any, metadata_params: Mapping[Any, Any]) -> None:
        self.plan = plan
        self.metadata = metadata_params
        self._hidden: list[tuple[Path, Any]] = []
        self._asked: dict[int, Where] = {}  # How Variables come in, by identity.
        self.functional = functionalized(plan.name, mdl, variables=self._sees, rngs=self._sees)
        group: Any = self.functional.groups[0]
        self.group: NNXGroup = group
        self.leaves = list(self.group.shown.items())
        # How each leaf comes in. A bare array of the module has not been asked about.
        self.into = [
            self._asked[id(leaf)] if id(leaf) in self._asked else plan.into(path[1:], leaf)
            for path, leaf in self.leaves
        ]
        self.parts, structure = jax.tree.flatten(list(self.group.shown.values()))
        self.treedef: Any = structure
        # Of each leaf its structure, and the numbers of its arrays among `parts`.
        self.structures: list[Any] = structure.children()  # type: ignore[attr-defined]
        ends = list(itertools.accumulate(of_leaf.num_leaves for of_leaf in self.structures))
        self.numbers = [range(*bounds) for bounds in zip([0, *ends], ends, strict=False)]

    def sizes(self) -> list[tuple[Path, int]]:
        """The sizes of the Variables that have an axis, with their paths."""
        found = []
        for (path, leaf), where, numbers in zip(self.leaves, self.into, self.numbers, strict=True):
            if isinstance(where, int) and not is_recorded(path, leaf):
                found += [(path[1:], axis_size(path[1:], self.parts[i], where)) for i in numbers]
        return found

    def explain(self, error: AttributeError) -> Exception:
        """The error where the function misses what no rule brings in; otherwise ``error``."""
        stream = getattr(error.obj, "tag", None)
        for path, leaf in self._hidden:
            if str(path[-1]) == error.name and stream in (None, _flax_private.rng_stream(leaf)):
                return ValueError(self.plan.unmapped(path, leaf, "used"))
        return error

    def differs(self, key: Key) -> str:
        """Message for what is the same for all steps, but written differently."""
        path, leaf = key[0] if isinstance(key, tuple) else "", None
        for (of_leaf, candidate), numbers in zip(self.leaves, self.numbers, strict=True):
            if key in numbers:
                path, leaf = path_text(of_leaf[1:]), candidate
        return self.plan.differs(path, leaf)

    def publish(self, form: Form, axes: Mapping[int, list[Any]], kept: Mapping[Key, Any]) -> None:
        """Writes to the targets what a call has left.

        Args:
          form: what a step has left.
          axes: what came out along each axis.
          kept: what came out without an axis.
        """
        self.functional.publish([self.updates(form, axes, kept)])

    def updates(
        self, form: Form, axes: Mapping[int, list[Any]], kept: Mapping[Key, Any]
    ) -> NNXUpdates:
        """What `publish` writes."""
        tables: dict[Any, Any] = {"input": self.parts, "kept": kept, **axes}
        new = []
        for leaf in form.leaves:
            values = [x if isinstance(x, Old) else tables[x[0]][x[1]] for x in leaf.sources]
            variable = leaf.treedef.unflatten(values)
            if isinstance(leaf.axis, int):
                variable = axis_added(self.plan.name, leaf.path, variable, leaf.axis, self.metadata)
            new.append(variable)
        return form.close(new)

    def _sees(self, path: Path, leaf: Any) -> bool:
        where = self.plan.into(path, leaf)
        self._asked[id(leaf)] = where
        if where is Kept.NOWHERE:
            self._hidden.append((path, leaf))
        return where is not Kept.NOWHERE

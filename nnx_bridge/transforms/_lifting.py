"""One lifted call: the Variables of the targets taken apart by a `Plan`, and put together again.

lifting = Lifting(plan, mdl, metadata_params)
inputs = lifting.inputs(size)                # what goes along an axis, what is carried, ...
step = inputs.step(slices, carried)          # inside, with the arrays of one step
y, updates = lifting.functional(step.variables, fn, *args)
written = step.take(updates)                 # what comes out along an axis, what does not
lifting.publish(written.form, axes, kept)    # outside, with the arrays of all steps
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from lifted._errors import Path, describe, dtype_of, key_of, path_text
from nnx_bridge import _flax_private
from nnx_bridge.functional import NNXUpdates, Old
from nnx_bridge.transforms._arguments import axis_size
from nnx_bridge.transforms._metadata import axis_added, axis_removed
from nnx_bridge.transforms._plan import Kept, Plan, Where
from nnx_bridge.transforms._targets import functionalized

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
      close: makes updates of the leaves.
    """

    leaves: list[Leaf]
    close: Callable[[list[Any]], NNXUpdates]


@dataclasses.dataclass(frozen=True)
class Taken:
    """What a step has written.

    Attributes:
      axes: what comes out along each axis.
      kept: what comes out without an axis, by key.
      form: the rest.
    """

    axes: Axes
    kept: dict[Key, Any]
    form: Form


class Lifting:
    """The targets of one call."""

    def __init__(self, plan: Plan, mdl: Any, metadata_params: Mapping[Any, Any]) -> None:
        self.plan = plan
        self.metadata = metadata_params
        self._hidden: list[tuple[Path, Any]] = []
        self._into: dict[int, Where] = {}  # How each leaf comes in, by its identity.
        self.functional = functionalized(plan.name, mdl, variables=self._sees, rngs=self._sees)
        (per_target,) = self.functional.structure.split(self.functional.variables)
        found, treedef = jax.tree_util.tree_flatten_with_path(per_target, is_leaf=is_variable)
        self.treedef: Any = treedef
        self.leaves = [(tuple(map(key_of, path)), leaf) for path, leaf in found]
        # Of each leaf its arrays and its structure.
        self.flat: list[tuple[list[Any], Any]] = [jax.tree.flatten(x) for _, x in self.leaves]
        self.parts = [part for parts, _ in self.flat for part in parts]

    def sizes(self) -> list[tuple[Path, int]]:
        """The sizes of the Variables that have an axis, with their paths."""
        found = []
        for (path, leaf), (parts, _) in zip(self.leaves, self.flat, strict=True):
            where = self.into(path, leaf)
            if isinstance(where, int) and not _flax_private.is_captured(path):
                found += [(path[1:], axis_size(path[1:], x, where)) for x in parts]
        return found

    def inputs(self, size: int | None) -> "Inputs":
        """What comes in, of a lifted axis of the given size; None for a loop without end."""
        return Inputs(self, size)

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
        number = 0
        for of_leaf, candidate in self.leaves:
            if number == key:
                path, leaf = path_text(of_leaf[1:]), candidate
            number += len(jax.tree.leaves(candidate))
        return self.plan.differs(path, leaf)

    def publish(self, form: Form, axes: Mapping[int, list[Any]], kept: Mapping[Key, Any]) -> None:
        """Writes to the targets what a call has left.

        Args:
          form: from `Step.take`.
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

    def into(self, path: Path, leaf: Any) -> Where:
        """How a leaf comes in."""
        # A bare array of the module has not been asked about.
        return self._into[id(leaf)] if id(leaf) in self._into else self.plan.into(path[1:], leaf)

    def _sees(self, path: Path, leaf: Any) -> bool:
        where = self.plan.into(path, leaf)
        self._into[id(leaf)] = where
        if where is Kept.NOWHERE:
            self._hidden.append((path, leaf))
        return where is not Kept.NOWHERE


class Inputs:
    """The parts of the Variables of a call, by how they come in.

    Attributes:
      axes: what goes along each axis; of an RNG stream that is split, a key for each step, or in a
        loop without end the one key.
      carried: what goes from step to step, by key.
      counts: the keys of the counts of RNG streams, which every step writes alike.
    """

    def __init__(self, lifting: Lifting, size: int | None) -> None:
        self.lifting = lifting
        self.axes: Axes = {}
        self.carried: dict[Key, Any] = {}
        self.counts: list[Key] = []
        # For each leaf how it comes in, the number of its first part, and its structure.
        self.places: dict[Path, tuple[Where, int, Any]] = {}
        self.wheres: list[Where] = []
        leaves = []
        for (path, leaf), (parts, treedef) in zip(lifting.leaves, lifting.flat, strict=True):
            where = _fitting(path, lifting.into(path, leaf), parts, size)
            start = len(self.wheres)
            self.places[path] = where, start, treedef
            for key, part in enumerate(parts, start):
                if where is Kept.CARRY:
                    self.carried[key] = part
                elif where is Kept.SPLIT:
                    keys = part if size is None else jax.random.split(part, size)
                    self.axes.setdefault(0, []).append(keys)
                    where = 0
                elif isinstance(where, int):
                    self.axes.setdefault(where, []).append(part)
                elif isinstance(leaf, nnx.RngCount):
                    self.counts.append(key)
                self.wheres.append(where)
            if isinstance(where, int):
                leaf = axis_removed(lifting.plan.name, path[1:], leaf, where, lifting.metadata)
            leaves.append(leaf)
        self.treedef: Any = jax.tree.structure(lifting.treedef.unflatten(leaves))

    def step(self, axes: Mapping[int, Sequence[Any]], carried: Sequence[Any]) -> "Step":
        """The inputs of one step: slices of what has an axis, what the last step left."""
        return Step(self, axes, carried)


class Step:
    """One step.

    Attributes:
      variables: what the functionaliser is given.
    """

    def __init__(
        self, inputs: Inputs, axes: Mapping[int, Sequence[Any]], carried: Sequence[Any]
    ) -> None:
        self._inputs = inputs
        iterators: dict[Any, Any] = {axis: iter(values) for axis, values in axes.items()}
        iterators[Kept.CARRY] = iter(carried)
        lifting = inputs.lifting
        self._parts = [
            part if where is Kept.BROADCAST else next(iterators[where])
            for part, where in zip(lifting.parts, inputs.wheres, strict=True)
        ]
        per_target = inputs.treedef.unflatten(self._parts)
        self.variables = lifting.functional.structure.join([per_target])

    def take(self, updates: Sequence[NNXUpdates]) -> Taken:
        """What the step has written, by how it comes out.

        Raises:
          ValueError: something was written that does not come out, or what is carried has changed
            its structure, shape or dtype.
        """
        numbers = {id(part): i for i, part in enumerate(self._parts)}
        plan = self._inputs.lifting.plan
        axes: Axes = {}
        kept: dict[Key, Any] = {}
        leaves = []
        written, close = updates[0].written()
        for entry in written:
            path = entry.path[1:]
            new: Any = None, 0, None
            into, start, old = self._inputs.places.get(entry.before or (), new)
            parts, treedef = jax.tree.flatten(entry.leaf)
            if all(isinstance(part, Old) and part.path == entry.before for part in parts):
                leaves.append(Leaf(path, treedef, parts, into))
                continue
            where = plan.out(path, entry.leaf, into)
            if where is Kept.NOWHERE:
                if not _flax_private.is_captured(path):
                    raise ValueError(plan.unmapped(path, entry.leaf, "written"))
                leaves.append(_dropped(path, entry.leaf, start, old))
                continue
            same = old is not None and old.num_leaves == len(parts)
            own = range(start, start + old.num_leaves) if old is not None else range(0)
            # What was recorded before may be in another place now.
            moves = isinstance(where, int) and _flax_private.is_captured(path)
            sources: list[Any] = []
            for i, part in enumerate(parts):
                number = numbers.get(id(part))
                if isinstance(part, Old):
                    if part.path == entry.before or part.path not in self._inputs.places:
                        sources.append(part)
                        continue
                    # An input of another Variable: here it may come out in another way.
                    part = self._parts[self._inputs.places[part.path][1] + part.number]
                if number in own and (moves or (number == start + i and where == into)):
                    sources.append(("input", number))
                elif isinstance(where, int):
                    along = axes.setdefault(where, [])
                    sources.append((where, len(along)))
                    along.append(part)
                else:
                    key: Key = start + i if same else (path_text(path), i)
                    if where is Kept.CARRY:
                        self._check_carried(path, key, part)
                    sources.append(("kept", key))
                    kept[key] = part
            leaves.append(Leaf(path, treedef, sources, where))
        return Taken(axes, kept, Form(leaves, close))

    def _check_carried(self, path: Path, key: Key, part: Any) -> None:
        name = self._inputs.lifting.plan.name
        if key not in self._inputs.carried:
            raise ValueError(
                f"{name}: {path_text(path)} is created in the loop, or changes its structure "
                "there, but it is carried. Create it before the loop."
            )
        before = self._inputs.carried[key]
        if (np.shape(before), dtype_of(before)) != (np.shape(part), dtype_of(part)):
            raise ValueError(
                f"{name}: {path_text(path)} is carried, so it must keep its shape and dtype: it "
                f"comes in as {describe(before)} and leaves as {describe(part)}."
            )


def _fitting(path: Path, where: Where, parts: Sequence[Any], size: int | None) -> Where:
    """``where``; but what was recorded outside of the lifted call has no axis."""
    if not isinstance(where, int) or not _flax_private.is_captured(path):
        return where
    fits = all(-np.ndim(x) <= where < np.ndim(x) and np.shape(x)[where] == size for x in parts)
    return where if fits else Kept.BROADCAST


def _dropped(path: Path, leaf: Any, start: int, old: Any) -> Leaf:
    """What was recorded without a rule is dropped, as Linen does: what there was before stays."""
    if old is None:
        old = jax.tree.structure(leaf.replace(type(leaf.get_raw_value())()))
    sources = [("input", start + i) for i in range(old.num_leaves)]
    return Leaf(path, old, sources, None)


def is_variable(x: Any) -> bool:
    """Whether ``x`` is a Variable."""
    return isinstance(x, nnx.Variable)

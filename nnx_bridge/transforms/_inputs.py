"""The Variables of one lifted call as they come into each step, and as each step leaves them."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from lifted._errors import Path, describe, dtype_of, path_text
from nnx_bridge._variable_types import collection_name
from nnx_bridge.functional import NNXUpdates, Old
from nnx_bridge.transforms._lifting import Axes, Form, Key, Leaf, Lifting
from nnx_bridge.transforms._metadata import axis_removed
from nnx_bridge.transforms._plan import Kept, Where
from nnx_bridge.transforms._targets import is_recorded


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


class Inputs:
    """The parts of the Variables of a call, by how they come in.

    Args:
      lifting: the call.
      size: of the lifted axis; None for a loop without end.

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
        # For each leaf how it comes in, the numbers of its parts, and its structure.
        self.places: dict[Path, tuple[Where, range, Any]] = {}
        self.wheres: list[Where] = []
        leaves, changed = [], False
        of_leaves = lifting.leaves, lifting.into, lifting.numbers, lifting.structures
        for (path, leaf), into, numbers, treedef in zip(*of_leaves, strict=True):
            parts = [lifting.parts[i] for i in numbers]
            where = _fitting(path, leaf, into, parts, size)
            self.places[path] = where, numbers, treedef
            for key, part in zip(numbers, parts, strict=True):
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
            seen = leaf
            if isinstance(where, int):
                seen = axis_removed(lifting.plan.name, path[1:], leaf, where, lifting.metadata)
            changed = changed or seen is not leaf
            leaves.append(seen)
        # What the leaves are made of inside: where one names its axes, with other names.
        self.treedef: Any = jax.tree.structure(leaves) if changed else lifting.treedef

    def step(self, axes: Mapping[int, Sequence[Any]], carried: Sequence[Any]) -> "Step":
        """The inputs of one step: slices of what has an axis, what the last step left."""
        return Step(self, axes, carried)


class Step:
    """One step."""

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

    @contextlib.contextmanager
    def opened(
        self, change: Callable[[list[Any]], list[Any]] | None = None
    ) -> Iterator[tuple[Any, Callable[[], Taken]]]:
        """A context with the module of this step, and a function that tells what was written to it,
        by how it comes out.

        Args:
          change: of the variables of the targets on their way in.
        """
        lifting = self._inputs.lifting
        leaves = self._inputs.treedef.unflatten(self._parts)
        given = dict(zip(self._inputs.places, leaves, strict=True))
        if change is not None:
            given = lifting.group.flat(change(lifting.group.by_target(given)))
        with lifting.group.opened_at(given) as (targets, written):
            yield lifting.functional.structure.join([targets]), lambda: self._take(written())

    def _take(self, updates: NNXUpdates) -> Taken:
        """What the step has written.

        Raises:
          ValueError: something was written that does not come out, or what is carried has changed
            its structure, shape or dtype.
        """
        plan = self._inputs.lifting.plan
        axes: Axes = {}
        kept: dict[Key, Any] = {}
        leaves = []
        written, close = updates.written()
        numbers = {id(part): i for i, part in enumerate(self._parts)} if written else {}
        for entry in written:
            path = entry.path[1:]
            new: Any = None, range(0), None
            into, own, old = self._inputs.places.get(entry.before or (), new)
            parts, treedef = jax.tree.flatten(entry.leaf)
            if all(isinstance(part, Old) and part.path == entry.before for part in parts):
                leaves.append(Leaf(path, treedef, parts, into))
                continue
            where = plan.out(path, entry.leaf, into)
            if where is Kept.NOWHERE:
                if not is_recorded(path, entry.leaf):
                    raise ValueError(plan.unmapped(path, entry.leaf, "written"))
                leaves.append(_dropped(path, entry.leaf, own, old))
                continue
            same = old is not None and len(own) == len(parts)
            # What was recorded before may be in another place now.
            moves = isinstance(where, int) and is_recorded(path, entry.leaf)
            sources: list[Any] = []
            for i, part in enumerate(parts):
                number = numbers.get(id(part))
                if isinstance(part, Old):
                    if part.path == entry.before or part.path not in self._inputs.places:
                        sources.append(part)
                        continue
                    # An input of another Variable: here it may come out in another way.
                    part = self._parts[self._inputs.places[part.path][1][part.number]]
                if number in own and (moves or (number == own.start + i and where == into)):
                    sources.append(("input", number))
                elif isinstance(where, int):
                    along = axes.setdefault(where, [])
                    sources.append((where, len(along)))
                    along.append(part)
                else:
                    key: Key = own[i] if same else (path_text(path), i)
                    if where is Kept.CARRY:
                        self._check_carried(path, entry.leaf, key, part)
                    sources.append(("kept", key))
                    kept[key] = part
            leaves.append(Leaf(path, treedef, sources, where))
        return Taken(axes, kept, Form(leaves, updates.graph.value is not None, close))

    def _check_carried(self, path: Path, leaf: Any, key: Key, part: Any) -> None:
        name = self._inputs.lifting.plan.name
        collection = collection_name(type(leaf))
        if key not in self._inputs.carried:
            raise ValueError(
                f"{name}: {path_text(path)} is created in the loop, or changes its structure "
                f"there, but its collection {collection!r} is carried. Create it before the loop."
            )
        before = self._inputs.carried[key]
        if (np.shape(before), dtype_of(before)) != (np.shape(part), dtype_of(part)):
            raise ValueError(
                f"{name}: {path_text(path)} of the collection {collection!r} is carried, so it "
                f"must keep its shape and dtype: it comes into a step as {describe(before)} and "
                f"leaves it as {describe(part)}. Convert what is written, such as with .astype, or "
                "give the Variable that shape and dtype before the loop."
            )


def _fitting(path: Path, leaf: Any, where: Where, parts: Sequence[Any], size: int | None) -> Where:
    """``where``; but what was recorded outside of the lifted call has no axis."""
    if not isinstance(where, int) or not is_recorded(path, leaf):
        return where
    fits = all(-np.ndim(x) <= where < np.ndim(x) and np.shape(x)[where] == size for x in parts)
    return where if fits else Kept.BROADCAST


def _dropped(path: Path, leaf: Any, own: Sequence[int], old: Any) -> Leaf:
    """What was recorded without a rule is dropped, as Linen does: what there was before stays."""
    if old is None:
        old = jax.tree.structure(leaf.replace(type(leaf.get_raw_value())()))
    return Leaf(path, old, [("input", i) for i in own], None)

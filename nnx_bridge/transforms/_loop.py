"""One call under `jax.lax.scan`."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import broadcast

from lifted._errors import describe
from nnx_bridge.transforms._arguments import axes_of
from nnx_bridge.transforms._carry import Carries
from nnx_bridge.transforms._inputs import Inputs
from nnx_bridge.transforms._invariants import varying_outputs
from nnx_bridge.transforms._lifting import Form, Key, Lifting
from nnx_bridge.transforms._linen_form import data_transformed
from nnx_bridge.transforms._targets import check_output


class Loop:
    """The call ``fn(mdl, carry, *xs)`` for each step.

    What every step writes alike (the counts of RNG streams, broadcast Variables, outputs with the
    axis `broadcast`) leaves the loop as a part of the carry that no step reads. The count of a
    stream is the highest that a step has left: where only some steps draw, no later call draws
    their keys.

    Attributes:
      slices: what `step` is run over, with the axis in front.
    """

    def __init__(
        self,
        lifting: Lifting,
        fn: Callable[..., Any],
        size: int,
        carry: Any,
        xs: tuple[Any, ...],
        axes: Sequence[Any],
        out_axes: Any,
        data_transform: Callable[..., Any] | None,
    ) -> None:
        self._lifting, self._fn, self._out_axes = lifting, fn, out_axes
        self._carry = carry
        self._carries = Carries("scan")
        # What is done to the variables of each step on their way in.
        self._change = data_transform and functools.partial(
            data_transformed, lifting.plan, data_transform
        )
        self._inputs = Inputs(lifting, size)
        self._along = list(self._inputs.axes)
        self._xs, treedef = jax.tree.flatten(xs)
        self._xs_treedef: Any = treedef
        self._xs_axes = axes
        self._forms: list[Form] = []
        self._ys: list[tuple[Any, list[Any]]] = []
        # What leaves the loop as every step writes it, and what else has been found to.
        self._alike: dict[Key, Any] = {key: lifting.parts[key] for key in self._inputs.counts}
        self._found: dict[Key, None] = {}
        self._has_broadcast_outputs = broadcast in jax.tree.leaves(out_axes)
        of_args = [
            _to_front(x, a) for x, a in zip(self._xs, axes, strict=True) if a is not broadcast
        ]
        along = self._inputs.axes.items()
        self.slices = of_args, [[_to_front(x, axis) for x in values] for axis, values in along]

    @property
    def start(self) -> Any:
        """The first carry: the user's, that of the Variables, and what every step writes alike."""
        return self._carry, list(self._inputs.carried.values()), list(self._alike.values())

    @property
    def needs_room(self) -> bool:
        """Whether something is written alike that has no place in the carry yet."""
        return bool(self._found) or (self._ys == [] and self._has_broadcast_outputs)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Says which Variable, or which part of the carry, an error is about."""
        try:
            with self._carries.explained():
                yield
        except AttributeError as error:
            raise self._lifting.explain(error) from error

    def finish(self, result: Any) -> Any:
        """Writes what was written; returns what was returned."""
        (carry, carried, alike), (ys, axes) = result
        kept = dict(zip(self._inputs.carried, carried, strict=True))
        kept |= dict(zip(self._alike, alike, strict=True))
        values = {
            axis: [_from_front(x, axis) for x in of_axis]
            for axis, of_axis in zip(self._lifting.plan.axes_out, axes, strict=True)
        }
        self._lifting.publish(self._forms[-1], values, kept)
        treedef, y_axes = self._ys[-1]
        stacked = iter(ys)
        outputs = [
            kept[_Output(i)] if axis is broadcast else _from_front(next(stacked), axis)
            for i, axis in enumerate(y_axes)
        ]
        return carry, treedef.unflatten(outputs)

    def make_room(self, check: bool) -> None:
        """Gives what is written by every step alike a place in the carry.

        Raises:
          ValueError: it is to be checked, and depends on the step.
        """
        state = self.start
        first = jax.eval_shape(lambda xs: jax.tree.map(lambda x: x[0], xs), self.slices)
        found = functools.partial(self.step, found_only=True)
        program, shapes = jax.make_jaxpr(found, return_shape=True)(state, first)
        alike = len(jax.tree.leaves(state[2]))
        varies = [True] * len(program.in_avals)
        start = len(jax.tree.leaves(state[:2]))
        varies[start : start + alike] = [False] * alike
        outputs = zip(self._found, shapes, varying_outputs(program, varies), strict=True)
        for key, shape, varying in outputs:
            if varying and check:
                raise ValueError(
                    f"scan: leaf {key.number} of the output depends on the step, but out_axes says "
                    "that it is broadcast. Give it an axis."
                    if isinstance(key, _Output)
                    else self._lifting.differs(key)
                )
            self._alike[key] = jnp.zeros_like(shape)
        self._found.clear()

    def step(self, state: Any, xs: Any, *, found_only: bool = False) -> Any:
        """One step; with ``found_only`` what is written alike and has no place in the carry."""
        carry, carried, left = state
        of_args, slices = xs
        step = self._inputs.step(dict(zip(self._along, slices, strict=True)), carried)
        each = iter(of_args)
        args = self._xs_treedef.unflatten(
            [
                x if axis is broadcast else next(each)
                for x, axis in zip(self._xs, self._xs_axes, strict=True)
            ]
        )
        with step.opened(self._change) as (mdl, take):
            y = self._fn(mdl, carry, *args)
            taken = take()
        check_output("scan", y)
        if not isinstance(y, (tuple, list)) or len(y) != 2:
            raise TypeError(
                "scan: the function must return a pair (carry, ys), as for jax.lax.scan; got "
                f"{jax.tree.structure(y)}."
            )
        before, (carry, ys) = carry, y
        self._carries.note(before, carry)
        ys, structure = jax.tree.flatten(ys)
        treedef: Any = structure
        y_axes = axes_of("scan", self._out_axes, treedef.unflatten(ys), broadcast, "out_axes")
        for i, (y, axis) in enumerate(zip(ys, y_axes, strict=True)):
            if axis is not broadcast and not -np.ndim(y) - 1 <= axis <= np.ndim(y):
                raise ValueError(
                    f"scan: out_axes={self._out_axes!r}: leaf {i} of the output is {describe(y)} "
                    f"in each step, so no axis {axis} can be added."
                )
        self._ys.append((treedef, y_axes))
        kept = taken.kept
        kept |= {_Output(i): y for i, y in enumerate(ys) if y_axes[i] is broadcast}
        stacked = [y for y, axis in zip(ys, y_axes, strict=True) if axis is not broadcast]
        after = [kept.pop(key, x) for key, x in zip(self._inputs.carried, carried, strict=True)]
        alike = [
            kept.pop(key, self._lifting.parts[key] if isinstance(key, int) else was)
            for key, was in self._alike.items()
        ]
        highest = len(self._inputs.counts)
        alike[:highest] = map(jnp.maximum, alike[:highest], left[:highest])
        self._found |= dict.fromkeys(kept)
        if found_only:
            return list(kept.values())
        self._forms.append(taken.form)
        axes = [taken.axes.get(axis, []) for axis in self._lifting.plan.axes_out]
        return (carry, after, alike), (stacked, axes)


@dataclasses.dataclass(frozen=True)
class _Output:
    """The key of a leaf of the output whose axis is `broadcast`."""

    number: int


def _to_front(x: Any, axis: int) -> Any:
    return x if axis == 0 else jnp.moveaxis(x, axis, 0)


def _from_front(x: Any, axis: int) -> Any:
    return x if axis == 0 else jnp.moveaxis(x, 0, axis)

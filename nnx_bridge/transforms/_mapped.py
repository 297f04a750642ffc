"""One call under `jax.vmap`."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nnx_bridge.transforms._inputs import Inputs
from nnx_bridge.transforms._lifting import Form, Key, Lifting
from nnx_bridge.transforms._targets import check_output


class Mapped:
    """The call ``fn(mdl, *args)`` for each index of an axis.

    The count of an RNG stream becomes the highest that an index has left: where only some draw, no
    later call draws their keys.
    """

    def __init__(
        self,
        lifting: Lifting,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        in_axes: Any,
        out_axes: Any,
        options: Mapping[str, Any],
    ) -> None:
        self._lifting, self._fn = lifting, fn
        self._of_variables = Inputs(lifting, options["axis_size"])
        self._along = list(self._of_variables.axes)
        slices: list[Any] = list(self._of_variables.axes.values())
        axes_in = list(self._along)
        if not slices and not args:  # Something has to have the axis.
            slices, axes_in = [jnp.arange(options["axis_size"])], [0]
        self._axes_out = lifting.plan.axes_out
        self._inputs = slices, args
        self._axes = {
            "in_axes": (axes_in, in_axes),
            "out_axes": (out_axes, self._axes_out, None, None),
            **options,
        }
        self._forms: list[Form] = []
        self._keys: list[Key] = []
        self._counts: list[Key] = self._of_variables.counts

    def run(self) -> Any:
        """Writes what was written; returns what was returned.

        Raises:
          ValueError: something is written without an axis that differs from index to index.
        """
        with self._explained():
            try:
                result = jax.vmap(self._step, **self._axes)(*self._inputs)
            except ValueError:
                # Where the function itself has raised, it has left no form.
                if not self._forms or not self._differs(lambda kept, counts: counts):
                    raise
                *others, _ = self._axes["out_axes"]
                axes = {**self._axes, "out_axes": (*others, 0)}
                *result, counts = jax.vmap(self._step, **axes)(*self._inputs)
                result = *result, [count.max(0) for count in counts]
        y, axes, kept, counts = result
        values = dict(zip((*self._keys, *self._counts), (*kept, *counts), strict=True))
        self._lifting.publish(self._forms[-1], dict(zip(self._axes_out, axes, strict=True)), values)
        return y

    def _step(self, slices: list[Any], args: tuple[Any, ...]) -> Any:
        """The call for one index: its result, what is written along each axis, what else, and the
        counts of RNG streams."""
        step = self._of_variables.step(dict(zip(self._along, slices, strict=False)), ())
        with step.opened() as (mdl, take):
            y = self._fn(mdl, *args)
            taken = take()
        check_output("vmap", y)
        self._forms.append(taken.form)
        counts = [taken.kept.pop(key, self._lifting.parts[key]) for key in self._counts]
        self._keys[:] = taken.kept
        axes = [taken.axes.get(axis, []) for axis in self._axes_out]
        return y, axes, list(taken.kept.values()), counts

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Says which Variable an error is about."""
        try:
            yield
        except AttributeError as error:
            raise self._lifting.explain(error) from error
        except ValueError as error:
            # Empty where the function itself has raised.
            for number, key in enumerate(self._keys):
                if self._differs(functools.partial(_of_kept, number)):
                    raise ValueError(self._lifting.differs(key)) from error
            raise

    def _differs(self, what: Callable[[list[Any], list[Any]], Any]) -> bool:
        """Whether something that is kept without an axis differs from index to index."""

        def one(*inputs: Any) -> Any:
            return what(*self._step(*inputs)[-2:])

        try:
            jax.eval_shape(jax.vmap(one, **{**self._axes, "out_axes": None}), *self._inputs)
        except ValueError:
            return True
        return False


def _of_kept(number: int, kept: list[Any], counts: list[Any]) -> Any:
    return kept[number]

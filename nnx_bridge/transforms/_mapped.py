"""One call under `jax.vmap`."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nnx_bridge.transforms._inputs import Inputs
from nnx_bridge.transforms._lifting import Form, Key, Lifting
from nnx_bridge.transforms._targets import check_output


class Mapped:
    """The call ``fn(mdl, *args)`` for each index of an axis.

    Attributes:
      inputs: what `step` is mapped over.
      axes: the arguments of `jax.vmap`.
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
        self.inputs = slices, args
        self.axes = {
            "in_axes": (axes_in, in_axes),
            "out_axes": (out_axes, self._axes_out, None),
            **options,
        }
        self._forms: list[Form] = []
        self._keys: list[Key] = []

    def step(self, slices: list[Any], args: tuple[Any, ...]) -> Any:
        """The call for one index: its result, what is written along each axis, and what else."""
        step = self._of_variables.step(dict(zip(self._along, slices, strict=False)), ())
        with step.opened() as (mdl, take):
            y = self._fn(mdl, *args)
            taken = take()
        check_output("vmap", y)
        self._forms.append(taken.form)
        self._keys[:] = taken.kept
        axes = [taken.axes.get(axis, []) for axis in self._axes_out]
        return y, axes, list(taken.kept.values())

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Says which Variable an error is about."""
        try:
            yield
        except AttributeError as error:
            raise self._lifting.explain(error) from error
        except ValueError as error:
            # Empty where the function itself has raised.
            for number, key in enumerate(self._keys):
                if self._differs(number):
                    raise ValueError(self._lifting.differs(key)) from error
            raise

    def finish(self, result: Any) -> Any:
        """Writes what was written; returns what was returned."""
        y, axes, kept = result
        values = dict(zip(self._keys, kept, strict=True))
        self._lifting.publish(self._forms[-1], dict(zip(self._axes_out, axes, strict=True)), values)
        return y

    def _differs(self, number: int) -> bool:
        """Whether something that is kept without an axis differs from index to index."""

        def one(*inputs: Any) -> Any:
            return self.step(*inputs)[-1][number]

        try:
            jax.eval_shape(jax.vmap(one, **{**self.axes, "out_axes": None}), *self.inputs)
        except ValueError:
            return True
        return False

"""The arguments of a lifted call: their axes and sizes."""

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from lifted._errors import Path, describe, path_text
from lifted._group import leaves
from nnx_bridge._variable_types import collection_name
from nnx_bridge.transforms._plan import Kept, Plan


def bind(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments after the module by position, as an axis is given for each.

    Raises:
      TypeError: a keyword argument has no position, or the arguments do not fit.
    """
    if not kwargs:
        return tuple(args)
    bound = inspect.signature(fn).bind(None, *args, **kwargs)
    bound.apply_defaults()
    if bound.kwargs:
        raise TypeError(
            f"{getattr(fn, '__name__', fn)}: {', '.join(bound.kwargs)} can be given by keyword "
            "only, but in_axes is by position; make it positional."
        )
    return bound.args[1:]


def axes_of(
    name: str, axes_prefix: Any, tree: Any, nothing: Any, argument: str = "in_axes"
) -> list[Any]:
    """The axis of each array of the arguments, or of the result.

    Args:
      name: of the transform.
      axes_prefix: axes, as a prefix of ``tree``.
      tree: the arguments after the module and after the carry, or the result.
      nothing: what stands for no axis.
      argument: of the transform, that the axes are.

    Raises:
      ValueError: they are no prefix, or one of them is no axis.
    """
    axes: list[Any] = []

    def note(axis: Any, part: Any) -> None:
        if axis is not nothing and (not isinstance(axis, int) or isinstance(axis, bool)):
            raise ValueError(f"{axis!r} is no axis")
        axes.extend([axis] * len(jax.tree.leaves(part)))

    try:
        jax.tree.map(note, axes_prefix, tree, is_leaf=lambda x: x is nothing)
    except ValueError as error:
        raise ValueError(
            f"{name}: {argument}={axes_prefix!r} does not fit: {error}; what it is for has the "
            f"structure {jax.tree.structure(tree)}."
        ) from None
    return axes


def check_variables(plan: Plan, axes_prefix: Any, args: tuple[Any, ...], nothing: Any) -> None:
    """Checks that Variables among the arguments, which are lifted as those of the module are, are
    not given another axis by ``in_axes``.

    Args:
      plan: of the transform.
      axes_prefix: its ``in_axes``, which fit.
      args: the arguments after the module and after the carry.
      nothing: what stands for no axis.

    Raises:
      ValueError: a Variable is.
    """

    def check(axis: Any, part: Any) -> None:
        for x in leaves(part):
            if not isinstance(x, nnx.Variable) or isinstance(x, nnx.RngState):
                continue
            where = plan.into((), x)
            if where is Kept.NOWHERE:
                raise ValueError(plan.unmapped(("an argument",), x, "given"))
            if axis is nothing if isinstance(where, int) else axis is not nothing:
                collection = collection_name(type(x))
                none = "None" if nothing is None else "broadcast"
                raise ValueError(
                    f"{plan.name}: in_axes gives the axis {axis} to a Variable among the "
                    f"arguments, a {type(x).__name__}, which is lifted as the collection "
                    f"{collection!r} of the module is. To map its value pass that, x[...]; "
                    f"otherwise give it the axis {where if isinstance(where, int) else none}."
                )

    jax.tree.map(check, axes_prefix, args, is_leaf=lambda x: x is nothing)


def sizes_of(axes: Sequence[Any], args: tuple[Any, ...]) -> list[tuple[Path, int]]:
    """The size of each array along its axis, with what it is called."""
    found = jax.tree_util.tree_leaves_with_path(args)
    return [
        (name, axis_size(name, x, axis))
        for axis, (path, x) in zip(axes, found, strict=True)
        if isinstance(axis, int)
        for name in [(f"argument{jax.tree_util.keystr(path)}",)]
    ]


def axis_size(name: Path, x: Any, axis: int) -> int:
    """The size of ``x`` along ``axis``.

    Raises:
      ValueError: it has no such axis.
    """
    shape = np.shape(x)
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{path_text(name)} has no axis {axis}: it is {describe(x)}.")
    return int(shape[axis])


def agreed(name: str, argument: str, given: int | None, sizes: Sequence[tuple[Path, int]]) -> int:
    """The size of the lifted axis, on which all agree.

    Args:
      name: of the transform.
      argument: by which the size may be given.
      given: that argument.
      sizes: names of what has the axis, with their sizes along it.

    Raises:
      TypeError: the argument is no integer.
      ValueError: it is negative, sizes disagree, or there is none.
    """
    if given is not None:
        if isinstance(given, bool) or not hasattr(given, "__index__"):
            raise TypeError(f"{name}: {argument}: expected an int, got {given!r}.")
        given = operator.index(given)
        if given < 0:
            raise ValueError(f"{name}: {argument}: expected 0 or more, got {given}.")
    known = [*([] if given is None else [((argument,), given)]), *sizes]
    if not known:
        raise ValueError(
            f"{name}: {argument} is needed: no argument and no Variable has a lifted axis."
        )
    first, size = known[0]
    for other, other_size in known:
        if other_size != size:
            raise ValueError(
                f"{name}: sizes along the lifted axis disagree: {path_text(first)} has {size}, "
                f"{path_text(other)} has {other_size}."
            )
    return size

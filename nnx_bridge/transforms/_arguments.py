"""The arguments of a lifted call: their axes and sizes."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lifted._errors import Path, describe, path_text


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
      ValueError: sizes disagree, or there is none.
    """
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

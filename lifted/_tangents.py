"""Tangents and cotangents as a caller gives them, matched with the values that they belong to.

Anything may be left out, None or zero; all mean zero. What is left out or None is not
differentiated at all. A value in a box (`nn.Partitioned`, an `nnx.Variable`) takes a tangent in a
box or without one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lifted._errors import (
    Path,
    describe,
    dtype_of,
    is_array,
    is_float0,
    key_of,
    path_text,
    suggestion,
)
from lifted._inputs import is_differentiable


def match_tangents(values: Any, tangents: Any, path: Path, *, partial: bool = False) -> list[Any]:
    """The tangent of each leaf of ``values``, None for zero.

    Args:
      values: pytree.
      tangents: pytree of the same structure, in which mappings may lack keys and anything may be
        None.
      path: where ``tangents`` stands, for messages.
      partial: whether keys that ``values`` lacks are passed over, because they may still be
        created.

    Raises:
      ValueError: a key that ``values`` lacks, or a tangent of another shape.
      TypeError: another structure or dtype, or a tangent other than zero for what cannot be
        differentiated.
    """
    if tangents is None:
        return [None] * len(jax.tree.leaves(values))
    children = _children(values)
    if isinstance(values, Mapping):
        return _match_mapping(values, children, tangents, path, partial)
    if children is None:
        tangent = _unboxed(tangents)
        return [None if tangent is None else _check_leaf(values, tangent, path)]
    inner = _children(tangents)
    if (
        inner is not None
        and [k for k, _ in inner] == [k for k, _ in children]
        and _alike(values, tangents)
    ):
        # What stands in a box has the path of the box.
        below = [path if _is_box(values, children) else (*path, key) for key, _ in children]
        pairs = [(v, t, p) for (_, v), (_, t), p in zip(children, inner, below, strict=True)]
        return [
            t for v, tangent, p in pairs for t in match_tangents(v, tangent, p, partial=partial)
        ]
    if _is_box(values, children):
        return match_tangents(children[0][1], _unboxed(tangents), path, partial=partial)
    raise TypeError(
        f"{path_text(path)}: expected a {_noun(path)} of the structure "
        f"{jax.tree.structure(values)} (None for zero), got {jax.tree.structure(tangents)}."
    )


def _match_mapping(
    values: Mapping[Any, Any],
    children: Sequence[tuple[Any, Any]] | None,
    tangents: Any,
    path: Path,
    partial: bool,
) -> list[Any]:
    if not isinstance(tangents, Mapping):
        raise TypeError(
            f"{path_text(path)}: expected a dictionary with the {_noun(path)}s of "
            f"{_listed(values)} (what is left out is zero), got {describe(tangents)}."
        )
    for key, tangent in tangents.items():
        if key not in values and jax.tree.leaves(tangent) and not partial:
            raise ValueError(
                f"{path_text((*path, key))}: a {_noun(path)} is given, but there is no such "
                f"{'variable' if path[0] == 'variable_tangents' else 'entry'}; "
                f"{suggestion(key, values)}."
            )
    pairs = [(v, tangents.get(key), (*path, key)) for key, v in children or ()]
    return [t for v, tangent, p in pairs for t in match_tangents(v, tangent, p, partial=partial)]


def _noun(path: Path) -> str:
    return "cotangent" if path[0] == "cotangent" else "tangent"


def _listed(values: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, values)) or "no variables"


def _children(x: Any) -> list[tuple[Any, Any]] | None:
    """Keys and children of a pytree node in JAX's order, None for a leaf."""
    entries = jax.tree_util.tree_leaves_with_path(x, is_leaf=lambda y: y is not x)
    if len(entries) == 1 and entries[0][0] == ():
        return None
    return [(key_of(path[0]), child) for path, child in entries]


def _alike(x: Any, y: Any) -> bool:
    """Whether two nodes may be matched child by child: the sequences by their type, others by what
    they hold."""
    return (
        type(x) is type(y) or not isinstance(x, (tuple, list)) and not isinstance(y, (tuple, list))
    )


def _is_box(x: Any, children: Sequence[tuple[Any, Any]]) -> bool:
    return len(children) == 1 and not isinstance(x, (tuple, list, Mapping))


def _unboxed(tangent: Any) -> Any:
    children = _children(tangent)
    if children is not None and _is_box(tangent, children):
        return _unboxed(children[0][1])
    return tangent


def _check_leaf(value: Any, tangent: Any, path: Path) -> Any:
    """``tangent`` where it fits ``value``; None where it is the trivial tangent of what cannot be
    differentiated."""
    where, noun = path_text(path), _noun(path)
    if not is_array(tangent):
        got = describe(tangent) if _children(tangent) is None else jax.tree.structure(tangent)
        raise TypeError(f"{where}: expected a {noun} of type {describe(value)}, got {got}.")
    if np.shape(tangent) != np.shape(value):
        raise ValueError(
            f"{where}: expected a {noun} of the shape of its value, {describe(value)}, got "
            f"{describe(tangent)}."
        )
    if not is_differentiable(value):
        if is_float0(tangent) or _is_concrete_zero(tangent):
            return None
        raise TypeError(
            f"{where}: {describe(value)} cannot be differentiated, so its {noun} can only be zero: "
            f"leave it out, or give None; got {describe(tangent)}."
        )
    if isinstance(tangent, (int, float)) and not isinstance(tangent, bool):
        return np.asarray(tangent, dtype_of(value))[()]
    if dtype_of(tangent) != dtype_of(value):
        raise TypeError(
            f"{where}: expected a {noun} of the dtype of its value, {describe(value)}, got "
            f"{describe(tangent)}. Convert it: {noun}.astype({dtype_of(value).name!r})."
        )
    return tangent


def _is_concrete_zero(tangent: Any) -> bool:
    if isinstance(tangent, jax.core.Tracer) or not jnp.issubdtype(dtype_of(tangent), np.number):
        return tangent is False
    return not np.any(np.asarray(tangent))

"""Variables as Linen has them, for functions of the user's that change them on the way in or out.

`map_variables` and the ``data_transform`` of `scan` were written for nested dicts by collection.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from flax.core import meta

from lifted._errors import Path, describe, path_text, suggestion
from lifted._nested import flat
from nnx_bridge import _flax_private
from nnx_bridge._collections import linen_path, to_variables
from nnx_bridge.functional import Predicate
from nnx_bridge.transforms._plan import Plan, Rule


def is_mapped(path: Path, leaf: Any, matches: Predicate) -> bool:
    """Whether ``leaf`` is a Variable that ``matches`` selects; those of RNG streams and what is
    captured never are."""
    return (
        isinstance(leaf, nnx.Variable)
        and not isinstance(leaf, nnx.RngState)
        and not _flax_private.is_captured(path)
        and matches(path, leaf)
    )


def selected(state: Any, matches: Predicate) -> nnx.State:
    """The Variables of a target that are mapped."""
    flat_state = nnx.to_flat_state(state) if isinstance(state, nnx.State) else ()
    found = [(path, leaf) for path, leaf in flat_state if is_mapped(tuple(path), leaf, matches)]
    return nnx.from_flat_state(found) if found else nnx.State({})


def with_values(state: Any, old: nnx.State, collections: Any, where: str) -> Any:
    """``state`` with the values of ``collections`` in the Variables ``old``.

    Args:
      state: of a target.
      old: those of its Variables that the collections are of.
      collections: nested dicts, as `to_variables` makes them.
      where: they come from, for messages.

    Raises:
      TypeError: the collections are no dicts.
      ValueError: they are of other Variables.
    """
    if not isinstance(collections, Mapping):
        raise TypeError(
            f"{where} must return nested dicts by collection, as it is given; it returned "
            f"{describe(collections)}."
        )
    given = {tuple(map(str, path)): value for path, value in flat(collections, ())}
    wanted = {
        tuple(map(str, linen_path(path, leaf))): (path, leaf)
        for path, leaf in nnx.to_flat_state(old)
    }
    for path in given.keys() ^ wanted.keys():
        what = "has returned" if path in given else "has not returned"
        others = wanted if path in given else given
        raise ValueError(
            f"{where} {what} {path_text(path)}; it must return the Variables that it was given: "
            f"{suggestion(path_text(path), map(path_text, others))}. A module finds its Variables "
            "by its attributes, so they keep their paths; shapes and dtypes may change. To pack or "
            "rename Variables, hold them so in the module, and unpack them where it uses them."
        )
    return _replaced(state, {path: (leaf, given[n]) for n, (path, leaf) in wanted.items()})


def _replaced(state: Any, new: Mapping[Any, tuple[nnx.Variable[Any], Any]]) -> Any:
    """``state`` with new values, boxed or not, in Variables at some paths."""
    if not new:
        return state
    leaves = dict(nnx.to_flat_state(state))
    for path, (leaf, value) in new.items():
        if isinstance(value, meta.AxisMetadata):
            (value,) = jax.tree.leaves(value)
        variable: nnx.Variable[Any] = jax.tree.map(lambda x: x, leaf)
        variable.set_raw_value(value)
        leaves[path] = variable
    return nnx.from_flat_state(list(leaves.items()))


def data_transformed(plan: Plan, transform: Callable[..., Any], states: list[Any]) -> list[Any]:
    """The variables of the targets in one step of a loop as ``transform`` makes them.

    Args:
      plan: which groups there are.
      transform: ``(variable_groups, rng_groups) -> (variable_groups, rng_groups)``.
      states: of the targets.

    Raises:
      ValueError: it returns other Variables than it was given.
    """
    groups = [
        [selected(state, functools.partial(_follows, plan, rule)) for state in states]
        for rule in plan.rules
    ]
    streams = [
        [_keys(state, plan, number) for state in states] for number in range(len(plan.split_rngs))
    ]
    new_groups, new_streams = transform(
        tuple(tuple(map(to_variables, group)) for group in groups),
        tuple(
            tuple({n: leaf.get_raw_value() for n, (_, leaf) in of.items()} for of in group)
            for group in streams
        ),
    )
    for group, new in zip(groups, new_groups, strict=True):
        states = [
            with_values(state, old, collections, "scan: data_transform")
            for state, old, collections in zip(states, group, new, strict=True)
        ]
    for keys_of, new in zip(streams, new_streams, strict=True):
        states = [
            _replaced(state, {path: (leaf, keys[name]) for name, (path, leaf) in of.items()})
            for state, of, keys in zip(states, keys_of, new, strict=True)
        ]
    return states


def _follows(plan: Plan, rule: Rule, path: Path, leaf: Any) -> bool:
    return plan.rule_into(path, leaf) is rule


def _keys(state: Any, plan: Plan, number: int) -> dict[str, tuple[Path, nnx.RngKey]]:
    """The keys of the streams that follow one entry of ``split_rngs``, by their places."""
    found = nnx.to_flat_state(state) if isinstance(state, nnx.State) else ()
    return {
        path_text(path[:-1]): (tuple(path), leaf)
        for path, leaf in found
        if isinstance(leaf, nnx.RngKey) and plan.stream_rule(leaf) == number
    }

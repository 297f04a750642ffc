"""`map_variables` and `add_metadata_axis`: a function sees other Variables than the module has."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from lifted._errors import Path, key_of, path_text
from nnx_bridge._collections import to_variables
from nnx_bridge.functional import NNXUpdates, Old, Predicate, Written, to_predicate
from nnx_bridge.transforms._linen_form import is_mapped, selected, with_values
from nnx_bridge.transforms._metadata import axis_added, axis_removed
from nnx_bridge.transforms._plan import rules_of_axes
from nnx_bridge.transforms._targets import check_output, functionalized, lift_target, with_targets

_NO_OPTIONS: Mapping[Any, Any] = {}


def _as_it_is(variables: Any) -> Any:
    return variables


def map_variables(
    target: Any,
    mapped_collections: Any = True,
    trans_in_fn: Callable[..., Any] = _as_it_is,
    trans_out_fn: Callable[..., Any] = _as_it_is,
    init: bool = False,
    mutable: bool = False,
    rngs: Any = True,
    variables: Any = True,
    methods: Any = None,
) -> Any:
    """`flax.linen.map_variables` on NNX: changes the Variables that a module sees.

    For masked, normalised or rescaled weights, without a change of the module.

    Args:
      target: a class of NNX modules, or a function of a module; may be written over a method.
      mapped_collections: filter of the collections that are changed.
      trans_in_fn: from what the module has to what the function sees: nested dicts by collection,
        of the same paths; values may change in shape and dtype.
      trans_out_fn: the way back, for what the function has written and, with ``init`` or
        ``mutable``, for what ``__init__`` of a class makes.
      init: whether ``trans_out_fn`` is applied to what ``__init__`` makes.
      mutable: whether the function may write the collections that are changed.
      rngs: filter of the RNG streams that are visible inside.
      variables: filter of further collections that are visible inside.
      methods: the methods of a class to lift, by default ``__call__``.

    Returns:
      A class or a function, as ``target`` is.

    Raises:
      TypeError: the target is neither.
      ValueError: a function changes the paths, or a mapped Variable is written though neither
        ``init`` nor ``mutable`` is given.

    Example:
      >>> import jax, jax.numpy as jnp, nnx_bridge as nn
      >>> from flax import nnx
      >>> Causal = nn.map_variables(nnx.Linear, 'params', lambda v: jax.tree.map(jnp.triu, v))
      >>> causal = Causal(3, 3, use_bias=False, rngs=nnx.Rngs(0))
      >>> bool((causal(jnp.ones(3)) == jnp.triu(causal.kernel[...]).sum(0)).all())
      True

    Source: https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    options = {
        "mapped_collections": mapped_collections,
        "trans_in_fn": trans_in_fn,
        "trans_out_fn": trans_out_fn,
        "init": init,
        "mutable": mutable,
        "rngs": rngs,
        "variables": variables,
    }
    return lift_target("map_variables", target, _mapped, options, methods, _mapped_init)


def _mapped(
    fn: Callable[..., Any],
    mapped_collections: Any = True,
    trans_in_fn: Callable[..., Any] = _as_it_is,
    trans_out_fn: Callable[..., Any] = _as_it_is,
    init: bool = False,
    mutable: bool = False,
    rngs: Any = True,
    variables: Any = True,
) -> Callable[..., Any]:
    matches = to_predicate(mapped_collections)

    @functools.wraps(fn)
    def mapped(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        inner, mdl, (args, kwargs) = with_targets(fn, mdl, (args, kwargs))
        visible = [mapped_collections, variables]
        functional = functionalized("map_variables", mdl, variables=visible, rngs=rngs)
        (states,) = functional.structure.split(functional.variables)
        olds = [selected(state, matches) for state in states]
        seen = [
            with_values(state, old, trans_in_fn(to_variables(old)), "map_variables: trans_in_fn")
            if old
            else state
            for state, old in zip(states, olds, strict=True)
        ]
        y, updates = functional(functional.structure.join([seen]), inner, *args, **kwargs)
        check_output("map_variables", y)
        views = [selected(state, matches) for state in seen]
        functional.publish(
            [_mapped_back(updates[0], views, matches, trans_out_fn, init or mutable)]
        )
        return y

    return mapped


def _mapped_init(
    fn: Callable[..., Any], init: bool = False, mutable: bool = False, **options: Any
) -> Callable[..., Any]:
    if not (init or mutable):
        options |= {"trans_out_fn": _as_it_is}
    return _mapped(fn, init=True, **options)


def _mapped_back(
    updates: NNXUpdates,
    views: list[nnx.State],
    matches: Predicate,
    trans_out_fn: Callable[..., Any],
    mutable: bool,
) -> NNXUpdates:
    """The updates of the module, of which ``updates`` are what the function has seen.

    Raises:
      ValueError: a mapped Variable was written and is not mutable.
    """
    seen = [dict(nnx.to_flat_state(view)) for view in views]
    found, close = updates.written()
    entries = [_with_views(entry, seen) for entry in found]
    # What the function has left of the Variables that it saw mapped: by target and path.
    left: list[dict[Any, Any]] = [{} for _ in views] if updates.graph.value else seen
    written: list[Path] = []
    for entry in entries:
        target, *path = entry.path
        if not is_mapped(tuple(path), entry.leaf, matches):
            continue
        untouched = all(isinstance(part, Old) for part in jax.tree.leaves(entry.leaf))
        if untouched and entry.before is not None:
            left[target][tuple(path)] = seen[entry.before[0]][entry.before[1:]]
        else:
            left[target][tuple(path)] = entry.leaf
            written.append(tuple(path))
    if not written:
        return close([entry.leaf for entry in entries])
    if not mutable:
        raise ValueError(
            f"map_variables: {path_text(written[0])} is written, but the collections that are "
            "mapped are read only. Pass mutable=True, and trans_out_fn for the way back."
        )
    changed: dict[Path, Any] = {}
    for target, of_target in enumerate(left):
        if of_target:
            state = nnx.from_flat_state(list(of_target.items()))
            collections = trans_out_fn(to_variables(state))
            state = with_values(state, state, collections, "map_variables: trans_out_fn")
            changed |= {(target, *path): leaf for path, leaf in nnx.to_flat_state(state)}
    new = close([changed.pop(entry.path, entry.leaf) for entry in entries])
    return new.replaced(changed)


def _with_views(entry: Written, seen: list[dict[Any, Any]]) -> Written:
    """What was written, with what the function saw where it put that into another Variable."""

    def value(part: Any) -> Any:
        if not isinstance(part, Old) or part.path == entry.before:
            return part
        view = seen[part.path[0]].get(part.path[1:])
        return part if view is None else jax.tree.leaves(view)[part.number]

    return dataclasses.replace(entry, leaf=jax.tree.map(value, entry.leaf))


def add_metadata_axis(
    target: Any,
    variable_axes: Mapping[Any, Any] = _NO_OPTIONS,
    metadata_params: Mapping[Any, Any] = _NO_OPTIONS,
) -> Any:
    """`flax.linen.add_metadata_axis` on NNX: the sharding names of Variables get an axis outside of
    a function, as `vmap` and `scan` do it, and their values do not.

    Args:
      target: a class of NNX modules, or a function of a module.
      variable_axes: for each collection the place of the axis, or None for no axis.
      metadata_params: ``{nn.PARTITION_NAME: name}``, the name of the axis.

    Returns:
      A class or a function, as ``target`` is.

    Raises:
      TypeError: the target is neither, or an axis is none.
      ValueError: the name is missing, or another one stands there.

    Example:
      >>> import jax, nnx_bridge as nn
      >>> from flax import nnx
      >>> from flax.linen import PARTITION_NAME
      >>> Named = nn.add_metadata_axis(nnx.Linear, {'params': 0}, {PARTITION_NAME: 'layers'})
      >>> with nnx.use_eager_sharding(False):
      ...     dense = Named(3, 2, kernel_metadata={'out_sharding': ('in', 'out')}, rngs=nnx.Rngs(0))
      >>> dense.kernel.out_sharding
      ('layers', 'in', 'out')

    Source: https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    options = {"variable_axes": variable_axes, "metadata_params": metadata_params}
    return lift_target("add_metadata_axis", target, _with_axis, options, None, _with_axis)


def _with_axis(
    fn: Callable[..., Any], variable_axes: Mapping[Any, Any], metadata_params: Mapping[Any, Any]
) -> Callable[..., Any]:
    name = "add_metadata_axis"
    rules = rules_of_axes(name, variable_axes, none=True)

    def changed(change: Callable[..., Any], path: Path, leaf: Any) -> Any:
        for rule in rules:
            if isinstance(rule.out, int) and is_mapped(path, leaf, rule.matches):
                return change(name, path, leaf, rule.out, metadata_params)
        return leaf

    @functools.wraps(fn)
    def with_axis(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        inner, mdl, (args, kwargs) = with_targets(fn, mdl, (args, kwargs))
        functional = functionalized(name, mdl)
        variables = jax.tree_util.tree_map_with_path(
            lambda path, leaf: changed(axis_removed, tuple(map(key_of, path)), leaf),
            functional.variables,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        y, updates = functional(variables, inner, *args, **kwargs)
        check_output(name, y)
        entries, close = updates[0].written()
        new = [changed(axis_added, entry.path[1:], entry.leaf) for entry in entries]
        functional.publish([close(new)])
        return y

    return with_axis

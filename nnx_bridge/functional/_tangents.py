"""Tangents of NNX Variables in the forms in which users have them, as an `nnx.State`."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from lifted._errors import Path, path_text, suggestion
from lifted._group import Filter
from lifted._inputs import is_differentiable
from lifted._nested import flat
from nnx_bridge._collections import linen_path
from nnx_bridge._variable_types import collection_name
from nnx_bridge.functional._storage import plain


def visible_for(tangents: Any) -> Filter:
    """A filter of the Variables that ``tangents`` may be of: as in Linen, all of a collection, or
    of a submodule, where one has a tangent."""
    if isinstance(tangents, nnx.Variable | nnx.Pytree) and not isinstance(tangents, Mapping):
        return True
    if not isinstance(tangents, Mapping):
        return tangents is not None
    keys = frozenset(tangents)

    def chosen(path: Path, leaf: Any) -> bool:
        named = isinstance(leaf, nnx.Variable) and collection_name(type(leaf)) in keys
        return named or bool(path) and path[0] in keys

    return chosen


def as_state(tangents: Any, variables: Any) -> Any:
    """Tangents in the form of ``variables``, from any form in which they may be given."""
    if isinstance(tangents, nnx.Pytree):
        tangents = _of_module(tangents, variables)
    tangents = jax.tree.map(plain, tangents, is_leaf=lambda x: isinstance(x, nnx.Variable))
    if not isinstance(variables, nnx.State) or not isinstance(tangents, Mapping):
        return tangents
    if isinstance(tangents, nnx.State) or not _is_linen(tangents, variables):
        return tangents
    given = {tuple(map(str, path)): value for path, value in flat(tangents, ())}
    rest = {path: value for path, value in given.items() if value is not None}
    found = {}
    for path, variable in nnx.to_flat_state(variables):
        if isinstance(variable, nnx.Variable):
            linen = tuple(map(str, linen_path(path, variable)))
            if linen in rest:
                found[path] = rest.pop(linen)
    if rest:
        known = ["/".join(map(str, linen_path(p, v))) for p, v in nnx.to_flat_state(variables)]
        unknown = path_text(next(iter(rest)))
        raise ValueError(
            f"variable_tangents/{unknown}: a tangent is given, but there is no such Variable; "
            f"{suggestion(unknown, known)}."
        )
    return nnx.from_flat_state(list(found.items())) if found else nnx.State({})


def _of_module(tangents: nnx.Pytree, variables: Any) -> nnx.State:
    """Tangents in a copy of the module, as `jax.tree.map` makes it.

    The copy has a Variable of its own at each place of one that the module shares; the first
    counts.
    """
    given = dict(nnx.to_flat_state(nnx.state(tangents)))
    wanted = [
        path
        for path, leaf in nnx.to_flat_state(variables)
        if any(map(is_differentiable, jax.tree.leaves(leaf)))
    ]
    for path in wanted:
        if path not in given:
            raise ValueError(
                f"variable_tangents: {type(tangents).__name__} is given as tangents of a module, "
                f"but it has no {path_text(path)}; "
                f"{suggestion(path_text(path), map(path_text, given))}. For tangents of some of "
                "the Variables give an nnx.State or {'params': {...}}."
            )
    return nnx.from_flat_state([(path, given[path]) for path in wanted])


def _is_linen(tangents: Mapping[Any, Any], variables: nnx.State) -> bool:
    """Whether the keys are names of collections, not of attributes."""
    return not all(key in variables for key in tangents)

"""The order in which the calls of two models first use each of their weights.

Both calls are traced, and the equations of their programs walked through: what Linen and NNX call
their layers does not matter, nor in which order they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from nnx_bridge._collections import Path, Variables, nest
from nnx_bridge.weights._arrays import holds_array
from nnx_bridge.weights._leaves import flat_state, linen_values, unboxed

# Of the Linen variables, and of the NNX model; on equal inputs.
Calls: TypeAlias = tuple[Callable[[Any], Any], Callable[[Any], Any]]
Orders: TypeAlias = tuple[Mapping[Path, int], Mapping[Path, int]]


def orders_of_use(calls: Calls, variables: Variables, model: Any) -> Orders:
    """The places of first use of all weights, by their paths in Linen and in NNX."""
    linen_call, nnx_call = calls
    boxed = dict(linen_values(variables))
    arrays = {path: unboxed(value)[0] for path, value in boxed.items()}

    def with_linen(values: dict[Path, Any]) -> Any:
        return linen_call(nest((path, values.get(path, boxed[path])) for path in boxed))

    graphdef, state = nnx.split(model)
    leaves = dict(flat_state(state))

    def with_nnx(values: dict[Path, Any]) -> Any:
        def filled(path: Path, leaf: Any) -> Any:
            if path not in values:
                return leaf
            return leaf.replace(values[path]) if isinstance(leaf, nnx.Variable) else values[path]

        new = nnx.from_flat_state([(path, filled(path, leaf)) for path, leaf in leaves.items()])
        return nnx_call(nnx.merge(graphdef, new))

    held = {p: x.get_value() if isinstance(x, nnx.Variable) else x for p, x in leaves.items()}
    return _order(with_linen, arrays), _order(with_nnx, held)


def _order(
    function: Callable[[dict[Path, Any]], Any], values: Mapping[Path, Any]
) -> dict[Path, int]:
    paths = [path for path, value in values.items() if _is_number(value)]

    def of_list(arrays: list[Any]) -> Any:
        return jax.tree.leaves(function(dict(zip(paths, arrays, strict=True))))

    described = [jax.ShapeDtypeStruct(values[p].shape, values[p].dtype) for p in paths]
    jaxpr = jax.make_jaxpr(of_list)(described).jaxpr
    places: dict[int, int] = {}
    known = {variable: i for i, variable in enumerate(jaxpr.invars)}
    for place, variable in enumerate(_uses(jaxpr, known)):
        places.setdefault(variable, place)
    return {paths[i]: place for i, place in places.items()}


def _is_number(value: Any) -> bool:
    return holds_array(value) and not jnp.issubdtype(value.dtype, jax.dtypes.extended)


def _uses(jaxpr: Any, known: Mapping[Any, int]) -> Iterator[int]:
    """The weights that the equations of a program take, in their order, inner programs included."""
    for equation in jaxpr.eqns:
        inner = [
            sub for sub in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr) if _is_jaxpr(sub)
        ]
        taken = [known.get(v) if isinstance(v, core.Var) else None for v in equation.invars]
        whole = [getattr(sub, "jaxpr", sub) for sub in inner]
        # Programs such as that of `cond` take the last of the operands, others take all.
        for sub in whole:
            operands = (
                taken[len(taken) - len(sub.invars) :] if len(sub.invars) <= len(taken) else ()
            )
            inside = {v: i for v, i in zip(sub.invars, operands, strict=False) if i is not None}
            yield from _uses(sub, inside)
        if not inner:
            yield from (i for i in taken if i is not None)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)

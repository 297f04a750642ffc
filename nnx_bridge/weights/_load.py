"""`load`: fills an NNX model with the weights of a Linen model, all of them or none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lifted._errors import describe
from lifted._trees import structure
from nnx_bridge._collections import Path, Variables
from nnx_bridge._placement import placed_like
from nnx_bridge.weights._leaves import flat_state
from nnx_bridge.weights._match import match
from nnx_bridge.weights._order import Calls
from nnx_bridge.weights._plan import Plan
from nnx_bridge.weights._problems import WeightsError, listed

# How far outputs may differ after a load, in roundings of the largest value: wide enough for layers
# that compute the same by other means, far below what a wrong weight does.
_ROUNDINGS = 1024.0
# Of a coarse dtype so many roundings would be everything.
_LARGEST = 0.05


def load(
    model: nnx.Module,
    variables: Variables,
    rules: Iterable[Any] = (),
    *,
    plan: Plan | None = None,
    calls: Calls | None = None,
    stack_axis: int | Mapping[str, int] | None = None,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
    cast: Sequence[str] = (),
    axis_names: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Fills an NNX model with the weights of a Linen model.

    Use it for a model that was rewritten by hand. Nothing is written unless every array of both
    sides has its partner, of the same shape and dtype, or is allowed by name to have none. A load
    that fails leaves the model as it was.

    Args:
      model: The NNX model; it is changed in place. It may be abstract (`nnx.eval_shape`). Arrays go
        to the devices that those of the model are on, or are to be on where it is abstract with
        shardings; otherwise they stay where `variables` have them.
      variables: Linen variables, boxed or not.
      rules: See `match`.
      plan: A plan of `match`, as it is or edited; instead of `rules` and what `match` takes.
      calls: Two functions that call the models on equal inputs: of the Linen variables, and of the
        NNX model. They decide where names and shapes do not (see `match`); and after the load they
        are run on copies, and the outputs must be equal up to rounding.
      stack_axis: See `match`.
      allow_missing: See `match`.
      allow_extra: See `match`.
      cast: See `match`.
      axis_names: Gives Variables without `out_sharding` the names of axes that Linen's boxes have,
        where these are known; with the axis of a stack added or removed. `nnx.Optimizer` then wants
        a mesh to be set, so it is not done unasked.
      dry_run: Only makes the plan, and writes nothing.

    Returns:
      The plan. `plan.to_linen(model)` is the way back.

    Raises:
      WeightsError: Something is missing, left over, ambiguous or of another shape or dtype, or the
        outputs differ; the message lists all paths.
      TypeError: An argument is not what it should be.

    Example:
        >>> from flax import linen as nn
        >>> x = np.ones((1, 2), np.float32)
        >>> linen = nn.Dense(3)
        >>> variables = linen.init(jax.random.key(0), x)
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
        >>> plan = load(model, variables, calls=(lambda v: linen.apply(v, x), lambda m: m(x)))
        >>> bool((model(x) == linen.apply(variables, x)).all())
        True
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"expected an NNX module, got {describe(model)}")
    options = dict(
        stack_axis=stack_axis, allow_missing=allow_missing, allow_extra=allow_extra, cast=cast
    )
    given = [
        name for name, value in {"rules": rules, **options}.items() if value not in ((), None, [])
    ]
    if plan is None:
        plan = match(variables, model, rules, calls=calls, **options)  # type: ignore[arg-type]
    elif given:
        raise TypeError(f"with a plan, {', '.join(given)} must be left out: they are in the plan")
    else:
        plan.check_models(variables, model)
    if dry_run:
        return plan
    new = list(_filled(plan, plan.to_nnx(variables), model, axis_names))
    if calls is not None:
        graphdef, state = nnx.split(model)
        old = {path: leaf for path, leaf in flat_state(state)} | dict(new)
        copy = nnx.merge(graphdef, nnx.from_flat_state(list(old.items())), copy=True)
        _check_outputs(calls[0](variables), calls[1](copy))
    nnx.update(model, nnx.from_flat_state(new))
    return plan


def _filled(
    plan: Plan, values: Mapping[Any, Any], model: nnx.Module, axis_names: bool
) -> Iterator[tuple[Path, Any]]:
    """The Variables of the model with their new values."""
    targets = {target.path: target for target in plan.nnx}
    linen = {leaf.path: leaf.names for leaf in plan.linen}
    names = {
        path: names
        for row in plan.rows
        for path, names in zip(row.nnx, row.names([linen[p] for p in row.linen]), strict=True)
    }
    for path, leaf in flat_state(model):
        if path not in names:
            continue
        value = _at(values, path)
        held = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        # A number of Python stays one.
        if hasattr(value, "dtype"):
            if not isinstance(value, jax.ShapeDtypeStruct | jax.core.Tracer):
                value = placed_like(value, held)
        if not isinstance(leaf, nnx.Variable):
            yield path, value
            continue
        variable = leaf.replace(value)
        if axis_names and names[path] is not None and targets[path].names is None:
            variable.set_metadata(out_sharding=names[path])
        yield path, variable


def _at(values: Mapping[Any, Any], path: Path) -> Any:
    for key in path:
        values = values[key]
    return values


def _check_outputs(expected: Any, came: Any) -> None:
    """Raises WeightsError where outputs differ by more than rounding."""
    if structure(expected) != structure(came):
        raise WeightsError(
            "the calls cannot be compared: the Linen model returns "
            f"{structure(expected)}, the NNX model {structure(came)}"
        )
    wrong = []
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(came), strict=True
    ):
        where = f"output{jax.tree_util.keystr(path)}"
        if np.shape(ours) != np.shape(theirs):
            wrong.append(f"{where}: expected {describe(ours)}, came {describe(theirs)}")
        elif np.size(ours):
            error, limit = _difference(ours, theirs)
            if not error <= limit:
                wrong.append(f"{where}: differs by {error:.3g}, at most {limit:.3g} is rounding")
    if wrong:
        raise WeightsError(
            f"the outputs differ with these weights:{listed(wrong, len(wrong))}\n"
            "The model was left as it was. Look at the plan (dry_run=True) for layers of equal "
            "shape that may be exchanged, and for square kernels that may be transposed."
        )


def _difference(expected: Any, came: Any) -> tuple[float, float]:
    """The largest difference between arrays, and the largest that may be rounding."""
    ours, theirs = np.asarray(expected), np.asarray(came)
    inexact = [d for d in (ours.dtype, theirs.dtype) if jnp.issubdtype(d, jnp.inexact)]
    eps = max((float(jnp.finfo(d).eps) for d in inexact), default=0.0)
    wide = np.result_type(np.float64, *(() if ours.dtype.kind in "Vb" else (ours.dtype,)))
    ours, theirs = ours.astype(wide), theirs.astype(wide)
    finite = np.isfinite(ours)
    if not np.array_equal(ours[~finite], theirs[~finite], equal_nan=True):
        return np.inf, 0.0
    largest = np.abs(ours[finite]).max(initial=0.0)
    limit = min(_ROUNDINGS * eps, _LARGEST) * float(largest)
    return float(np.abs(ours[finite] - theirs[finite]).max(initial=0.0)), limit

"""Train states in memory, and checkpoints that are read into a model and its optimizer."""

from __future__ import annotations

import os
from pathlib import Path as FilePath
from typing import Any, TypeVar

from flax import nnx, serialization

from nnx_bridge._names import located
from nnx_bridge.checkpoints import _mapping, _plan
from nnx_bridge.checkpoints._entries import (
    CheckpointError,
    Entries,
    Path,
    flat,
    is_empty,
    loaded,
    nested,
    read_all,
)
from nnx_bridge.checkpoints._layout import Layout, Linen, Nnx, find_layout, is_apart
from nnx_bridge.checkpoints._mapping import RNGS
from nnx_bridge.checkpoints._names import VALUE
from nnx_bridge.checkpoints._places import check, places
from nnx_bridge.checkpoints._source import open_source
from nnx_bridge.weights import Plan

T = TypeVar("T")
_LIVE = Nnx("nnx_train_state", ("model",), ("optimizer",))


def from_train_state(
    train_state: Any,
    model: nnx.Module,
    optimizer: nnx.Optimizer[Any] | None = None,
    *,
    plan: Plan | None = None,
) -> dict[str, Any]:
    """Fills an NNX model and its optimizer from a Linen train state in memory.

    Use it where a run is moved within one process; `load_checkpoint` does the same from a file.

    Args:
      train_state: A `flax.training.train_state.TrainState` or anything like it, a dataclass of
        Flax or a dict, with `params`, `opt_state` and `step`, and other fields; or Linen variables.
      model: An NNX model, native or a `Host`, with the same variables; it may be abstract
        (`nnx.eval_shape`). Its RNG streams are left as they are. Arrays go to the devices that
        those of the model were put on; without such the model gets the arrays of the train state
        themselves, on whatever devices they are.
      optimizer: Its optimizer, made with the same Optax transformation. None leaves the state of
        the optimizer out.
      plan: See `convert`.

    Returns:
      What else the train state has, by field: averages of parameters in dicts by NNX paths, keys.

    Raises:
      CheckpointError: Something is missing, or left, or of another shape or dtype. Neither model
        nor optimizer is changed then.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> variables = {"params": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> from_train_state(variables, model)
        {}
        >>> model(jnp.ones((1, 2)))
        Array([[3., 3., 3.]], dtype=float32)
    """
    entries = _entries(train_state)
    return _fill(entries, find_layout(entries), model, optimizer, plan, "the train state")


def to_train_state(
    model: nnx.Module,
    optimizer: nnx.Optimizer[Any] | None,
    like: T,
    *,
    plan: Plan | None = None,
    **fields: Any,
) -> T:
    """A Linen train state with the values of an NNX model and its optimizer.

    The inverse of `from_train_state`.

    Args:
      model: The model.
      optimizer: Its optimizer; None if `like` has no state of one.
      like: A train state, or variables, of the structure wanted; what it holds of random numbers is
        in the result.
      plan: See `convert`.
      **fields: Values of further fields, as `from_train_state` returns them.

    Returns:
      A new train state.

    Raises:
      CheckpointError: The two do not have the same leaves.

    Example:
        >>> import numpy as np
        >>> variables = {"params": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> to_train_state(model, None, variables)["params"]["bias"]
        Array([0., 0., 0.], dtype=float32)
    """
    structure = _entries(like)
    linen = _linen(structure, "like")
    entries = {path: place.value for path, place in places(model, optimizer).items()}
    where, _ = _mapping.to_nnx(structure, linen, plan is not None)
    # Fields that follow the parameters, such as averages of them.
    follow = {target[0] for target in where.values() if target and target[-1] == VALUE}
    for path, leaf in flat(fields) if fields else ():
        entries[(*path, VALUE) if path[0] in follow else path] = leaf
    made = _mapping.to_linen(entries, _LIVE, structure, linen, plan)
    result = {**structure, **dict(zip(made, read_all(list(made.values())), strict=True))}
    return serialization.from_state_dict(like, nested(result))


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nnx.Module,
    optimizer: nnx.Optimizer[Any] | None = None,
    *,
    layout: str | None = None,
    item: str | None = None,
    plan: Plan | None = None,
) -> dict[str, Any]:
    """Fills an NNX model and its optimizer from a checkpoint, of Linen or of NNX.

    Args:
      path: What `convert` takes as its source, or what it has written.
      model: See `from_train_state`. A model that is sharded stays sharded.
      optimizer: See `from_train_state`.
      layout: See `convert`.
      item: See `convert`.
      plan: See `convert`; for a Linen checkpoint.

    Returns:
      What else the checkpoint has, see `from_train_state`.

    Raises:
      CheckpointError: As for `from_train_state`, or the checkpoint cannot be read.

    Example:
        >>> import tempfile, numpy as np
        >>> file = FilePath(tempfile.mkdtemp()) / "weights.msgpack"
        >>> params = {"kernel": np.ones((2, 3), "f4"), "bias": np.zeros(3, "f4")}
        >>> _ = file.write_bytes(serialization.to_bytes(params))
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> load_checkpoint(file, model)
        {}
        >>> float(model.kernel[0, 0])
        1.0
    """
    source = open_source(FilePath(path), item=item, unsharded=True)
    found = source.layout(layout)
    beside = _fill(source.entries, found, model, optimizer, plan, str(source.where))
    if isinstance(found, Nnx):
        # Keys of the train state that the checkpoint was made from.
        beside.update(nested({p: loaded(leaf) for p, leaf in source.apart.items()} or {(): {}}))
    return beside


def _fill(
    entries: Entries,
    layout: Layout,
    model: nnx.Module,
    optimizer: nnx.Optimizer[Any] | None,
    plan: Plan | None,
    what: str,
) -> dict[str, Any]:
    """Fills model and optimizer; returns what else there is."""
    if isinstance(layout, Linen):
        where, made = _mapping.to_nnx(entries, layout, plan is not None)
        keys = {t[1:]: entries[p] for p, t in where.items() if t and t[0] == RNGS}
        entries = {t: entries[p] for p, t in where.items() if t and t[0] != RNGS}
        if plan is not None:
            entries = _plan.apply(plan, entries, (VALUE,), made.model)
    else:
        made, keys = layout, {}
        end: Path = (VALUE,) if layout.pure else ()
        entries = {(*p, *end): leaf for p, leaf in entries.items()}
    targets = places(model, optimizer)
    values, beside = (
        {p: leaf for p, leaf in part.items() if p in targets or not is_apart(p, leaf, _LIVE)}
        for part in _split(entries, made)
    )
    values = {located(path, targets): leaf for path, leaf in values.items()}
    check(values, targets, what, optimizer is not None)
    filled = {path: place for path, place in targets.items() if path in values}
    arrays = read_all([values[path] for path in filled])
    for place, value in zip(filled.values(), arrays, strict=True):
        if not is_empty(value):
            place.fill(value)
    rest = {p[:-1] if p[-1] == VALUE and len(p) > 1 else p: v for p, v in beside.items()}
    rest.update(keys)
    return nested({p: loaded(leaf) for p, leaf in rest.items()}) if rest else {}


def _entries(train_state: Any) -> dict[Path, Any]:
    return dict(flat(serialization.to_state_dict(train_state)))


def _linen(structure: Entries, what: str) -> Linen:
    layout = find_layout(structure)
    if not isinstance(layout, Linen):
        raise CheckpointError(f"{what} has the layout {layout.name!r}, which is not one of Linen")
    return layout


def _split(entries: Entries, layout: Nnx) -> tuple[dict[Path, Any], dict[Path, Any]]:
    """What belongs to model and optimizer, by the paths of `places`, and what else there is."""
    values: dict[Path, Any] = {}
    beside: dict[Path, Any] = {}
    for path, leaf in entries.items():
        if layout.optimizer and path[: len(layout.optimizer)] == layout.optimizer:
            values[("optimizer", *map(str, path[len(layout.optimizer) :]))] = leaf
        elif path[: len(layout.model)] == layout.model:
            values[("model", *map(str, path[len(layout.model) :]))] = leaf
        else:
            beside[path] = leaf
    return values, beside

"""Train states in memory, and checkpoints that are read into a model and its optimizer."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx, serialization

from nnx_bridge._names import located
from nnx_bridge._placement import placed_like
from nnx_bridge.checkpoints import _mapping, _plan
from nnx_bridge.checkpoints._entries import (
    CheckpointError,
    Entries,
    Path,
    flat,
    is_empty,
    listed,
    loaded,
    nested,
    read_all,
    written,
)
from nnx_bridge.checkpoints._layout import Layout, Linen, Nnx, find_layout, is_apart
from nnx_bridge.checkpoints._mapping import RNGS
from nnx_bridge.checkpoints._names import VALUE
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
        >>> variables = {"params": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> to_train_state(model, None, variables)["params"]["bias"]
        Array([0., 0., 0.], dtype=float32)
    """
    structure = _entries(like)
    linen = _linen(structure, "like")
    entries = {path: place.value for path, place in _targets(model, optimizer).items()}
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
    targets = _targets(model, optimizer)
    values, beside = (
        {p: leaf for p, leaf in part.items() if p in targets or not is_apart(p, leaf, _LIVE)}
        for part in _split(entries, made)
    )
    values = {located(path, targets): leaf for path, leaf in values.items()}
    _check(values, targets, what, optimizer is not None)
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
    """What belongs to model and optimizer, by the paths of `_targets`, and what else there is."""
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


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an array is: in a Variable, among the leaves of its value, which may be a list."""

    variable: nnx.Variable[Any]
    index: int

    @property
    def value(self) -> Any:
        leaves = jax.tree.leaves(self.variable.get_value())
        # A MaskedNode of Optax has none.
        return leaves[self.index] if leaves else None

    def fill(self, value: Any) -> None:
        leaves, structure = jax.tree.flatten(self.variable.get_value())
        leaves[self.index] = _placed(value, leaves[self.index])
        self.variable.set_value(jax.tree.unflatten(structure, leaves))


def _targets(model: Any, optimizer: Any) -> dict[Path, _Place]:
    targets: dict[Path, _Place] = {}
    for name, of in (("model", model), ("optimizer", optimizer)):
        if of is not None:
            for path, variable in nnx.to_flat_state(nnx.state(of)):
                if not isinstance(variable, nnx.RngState):
                    start = (name, *map(str, path), VALUE)
                    inner = jax.tree_util.tree_leaves_with_path(variable.get_value()) or [((), 0)]
                    for i, (keys, _) in enumerate(inner):
                        names = (jax.tree_util.keystr((key,), simple=True) for key in keys)
                        targets[(*start, *names)] = _Place(variable, i)
    return targets


def _check(values: Entries, targets: Mapping[Path, _Place], what: str, has_optimizer: bool) -> None:
    held = {path: place.value for path, place in targets.items()}
    lacking = [p for p, value in held.items() if p not in values and not is_empty(value)]
    left = [
        p
        for p, leaf in values.items()
        if p not in held and not is_empty(leaf) and (has_optimizer or p[0] == "model")
    ]
    problems = []
    if lacking:
        problems.append(f"{what} lacks {listed(p[:-1] for p in lacking)}")
    if left:
        problems.append(f"the model has no place for {listed(p[:-1] for p in left)}")
        names = {written(p[:-1]): written(left[0][:-1]) for p in lacking}
        near = difflib.get_close_matches(written(left[0][:-1]), names, n=1)
        if near:
            problems.append(f"is {written(left[0][:-1])} what the model calls {near[0]}?")
    for path, value in held.items():
        if path in values and is_empty(value) != is_empty(values[path]):
            of = what if is_empty(values[path]) else "the optimizer"
            problems.append(f"{written(path[:-1])} is masked in {of} alone")
        elif path in values and not is_empty(value):
            problems.extend(_difference(path[:-1], values[path], value))
    if problems:
        raise CheckpointError("; ".join(problems[:8]))


def _difference(path: Path, saved: Any, held: Any) -> list[str]:
    if path == ("optimizer", "step"):
        return []
    if not hasattr(held, "dtype") or not hasattr(saved, "dtype"):
        return []
    a, b = (f"{np.dtype(x.dtype).name}{list(x.shape)}" for x in map(_numbers, (saved, held)))
    return [] if a == b else [f"{written(path)} is {a} there and {b} in the model"]


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(getattr(leaf, "dtype", np.void), jax.dtypes.prng_key)


def _numbers(leaf: Any) -> Any:
    """What a checkpoint keeps of a leaf: of a key the integers that it is made of."""
    return jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf


def _placed(value: Any, held: Any) -> Any:
    if getattr(held, "sharding", None) is None:
        return value
    if _is_key(held) != _is_key(value):
        value = (
            jax.random.wrap_key_data(value, impl=jax.random.key_impl(held))
            if _is_key(held)
            else jax.random.key_data(value)
        )
    same = getattr(value, "dtype", None) == held.dtype
    return placed_like(value if same else jax.numpy.asarray(value, held.dtype), held)

"""Where the arrays of an NNX model and of its optimizer are, and what may be put there."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from nnx_bridge._placement import placed_like
from nnx_bridge.checkpoints._entries import (
    CheckpointError,
    Entries,
    Path,
    is_empty,
    listed,
    written,
)
from nnx_bridge.checkpoints._names import VALUE


@dataclasses.dataclass(frozen=True)
class Place:
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


def places(model: Any, optimizer: Any) -> dict[Path, Place]:
    """The arrays of a model and of its optimizer, without RNG streams, by their paths."""
    targets: dict[Path, Place] = {}
    for name, of in (("model", model), ("optimizer", optimizer)):
        if of is not None:
            for path, variable in nnx.to_flat_state(nnx.state(of)):
                if not isinstance(variable, nnx.RngState):
                    start = (name, *map(str, path), VALUE)
                    inner = jax.tree_util.tree_leaves_with_path(variable.get_value()) or [((), 0)]
                    for i, (keys, _) in enumerate(inner):
                        names = (jax.tree_util.keystr((key,), simple=True) for key in keys)
                        targets[(*start, *names)] = Place(variable, i)
    return targets


def check(values: Entries, targets: Mapping[Path, Place], what: str, has_optimizer: bool) -> None:
    """Checks that ``values`` are those of the places, in shape and dtype.

    Args:
      values: What is to be filled in, by its paths.
      targets: The places by theirs.
      what: Where the values are from, for the message.
      has_optimizer: Whether there are places of an optimizer; if not, its values are passed over.

    Raises:
      CheckpointError: One side has what the other lacks, or has it in another form.
    """
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

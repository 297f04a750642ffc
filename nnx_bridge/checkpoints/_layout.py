"""Which layout a checkpoint has: found from the names in it.

Linen users save a `TrainState` or any dataclass or dict like it, the variables that `init`
returned, or the parameters alone; NNX users save `nnx.state` of a model, or of a model and its
optimizer. Each may stand below one more key, with other things beside it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from nnx_bridge.checkpoints._entries import (
    CheckpointError,
    Entries,
    Path,
    Stored,
    below,
    is_empty,
    listed,
)

LAYOUTS = ("train_state", "variables", "params", "nnx_train_state", "nnx_model")
Name = Literal["train_state", "variables", "params", "nnx_train_state", "nnx_model"]

# Collections of Flax's own modules; others are collections where `init` returned them.
_COLLECTIONS = ("batch_stats", "cache", "intermediates", "perturbations", "losses")
_WRAPPERS = ("state", "train_state", "model", "default", "ckpt", "checkpoint")
_VALUE = "value"


@dataclasses.dataclass(frozen=True)
class Linen:
    """Where the parts of a Linen train state are.

    Attributes:
      name: of the layout.
      collections: where each collection stands.
      opt_state: where the optimizer's state stands.
      step: where the step stands.
      root: where all of it stands.
    """

    name: str
    collections: Mapping[str, Path]
    opt_state: Path | None = None
    step: Path | None = None
    root: Path = ()

    kind = "linen"


@dataclasses.dataclass(frozen=True)
class Nnx:
    """Where the parts of an NNX train state are.

    Attributes:
      name: of the layout.
      model: where the model's state stands.
      optimizer: where the optimizer's state stands.
      pure: whether arrays stand at their Variables' paths, not below ``value``.
    """

    name: str
    model: Path
    optimizer: Path | None = None
    pure: bool = False

    kind = "nnx"


Layout = Linen | Nnx


def find_layout(entries: Entries, name: str | None = None) -> Layout:
    """The layout of a checkpoint.

    Args:
      entries: The checkpoint.
      name: One of `LAYOUTS`, where it is known.

    Raises:
      CheckpointError: No layout fits; the message says what is at the top.
    """
    if name is not None and name not in LAYOUTS:
        near = difflib.get_close_matches(name, LAYOUTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CheckpointError(f"no layout is called {name!r}{hint}; there are {', '.join(LAYOUTS)}")
    if not any(hasattr(leaf, "shape") for leaf in entries.values()):
        raise CheckpointError("there is no array in the checkpoint")
    found = [
        layout
        for layout in (_nnx(entries), _train_state(entries), _variables(entries), _params(entries))
        if layout is not None and name in (None, layout.name)
    ]
    if found:
        return found[0]
    what = f"the layout {name!r}" if name else "a known layout"
    top = listed((key,) for key in _top(entries))
    raise CheckpointError(f"the checkpoint does not have {what}; at its top are {top}")


def _top(entries: Entries, root: Path = ()) -> list[str | int]:
    depth = len(root)
    return list(dict.fromkeys(p[depth] for p in entries if p[:depth] == root and len(p) > depth))


def _roots(entries: Entries) -> list[Path]:
    """Where a train state may stand: at the top, or below one more key."""
    return [(), *((key,) for key in _top(entries) if key in _WRAPPERS)]


def _has(entries: Entries, path: Path) -> bool:
    return any(p[: len(path)] == path for p in entries)


def _in_variables(entries: Entries, root: Path) -> bool:
    """Whether every array below ``root`` is in a Variable."""
    arrays = [p for p, leaf in entries.items() if p[: len(root)] == root and not is_empty(leaf)]
    return bool(arrays) and all(p[-1] == _VALUE and len(p) > len(root) for p in arrays)


def _nnx(entries: Entries) -> Nnx | None:
    for model, optimizer in ((("model",), ("optimizer",)), (("0",), ("1",)), ((0,), (1,))):
        if not _has(entries, model):
            continue
        if _has(entries, (*optimizer, "step")) or _has(entries, (*optimizer, "opt_state")):
            return Nnx("nnx_train_state", model, optimizer, not _in_variables(entries, model))
        # A number without an optimizer beside it is a place in a model that is a list.
        named = model == ("model",) and not _has(entries, (*model, "params"))
        if named and _in_variables(entries, model):
            return Nnx("nnx_train_state", model)
    if _in_variables(entries, ()) and not _has(entries, ("params",)):
        return Nnx("nnx_model", ())
    return None


def _train_state(entries: Entries) -> Linen | None:
    for root in _roots(entries):
        params = (*root, "params")
        fields = _top(entries, root)
        if not _has(entries, params) or not {"opt_state", "step"} & set(fields):
            continue
        collections = {"params": params}
        inner = _top(entries, params)
        if "params" in inner and (inner == ["params"] or set(inner) <= {"params", *_COLLECTIONS}):
            # What was given as the parameters are all variables.
            collections = {str(name): (*params, name) for name in inner}
        for field in fields:
            inner = _top(entries, (*root, field))
            if field in _COLLECTIONS and inner:
                collections[str(field)] = (*root, field)
            elif field != "params" and inner and set(inner) <= {*_COLLECTIONS}:
                collections.update({str(name): (*root, field, name) for name in inner})
        step = (*root, "step")
        return Linen(
            "train_state",
            collections,
            (*root, "opt_state") if "opt_state" in fields else None,
            step if step in entries else None,
            root,
        )
    return None


def _variables(entries: Entries) -> Linen | None:
    for root in _roots(entries):
        names = _top(entries, root)
        if "params" not in names:
            continue
        parameters = set(below(entries, (*root, "params")))
        collections = {"params": (*root, "params")}
        for name in names:
            if name == "params" or not _top(entries, (*root, name)):
                continue
            # A second tree of the parameters (an average of them, say) is no collection.
            if set(below(entries, (*root, name))) != parameters and (
                root == () or name in _COLLECTIONS
            ):
                collections[str(name)] = (*root, name)
        return Linen("variables", collections, root=root)
    return None


def _params(entries: Entries) -> Linen | None:
    if any(isinstance(part, int) for path in entries for part in path) or () in entries:
        return None
    if all(
        is_empty(leaf) or isinstance(leaf, Stored) or hasattr(leaf, "shape")
        for leaf in entries.values()
    ):
        return Linen("params", {"params": ()})
    return None


def is_apart(path: Path, leaf: Any, layout: Layout) -> bool:
    """Whether a leaf is kept apart: random numbers, but not those that an optimizer draws from,
    which are a part of its state."""
    root = layout.opt_state if isinstance(layout, Linen) else layout.optimizer
    return is_rng(path, leaf) and (root is None or path[: len(root)] != root)


def is_rng(path: Path, leaf: Any) -> bool:
    """Whether a leaf is the state of random numbers: a key, or the count of an NNX stream.

    A checkpoint keeps a key as the integers it is made of, so its name decides.
    """
    names = [str(part).lower() for part in path if part != _VALUE]
    if not names or not hasattr(leaf, "dtype"):
        return False
    if str(leaf.dtype).startswith("key<"):
        return True
    if np.dtype(leaf.dtype) != np.uint32:
        return False
    stream = len(names) > 1 and "rng" in names[-2]
    named = any(word in names[-1] for word in ("rng", "key", "seed"))
    if names[-1] == "count":
        return any("rng" in name or "streams" in name for name in names[:-1])
    return (named or stream) and leaf.shape[-1:] in ((2,), (4,))

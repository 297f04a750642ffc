"""The structure of a Linen checkpoint without its arrays, for the way back from NNX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nnx_bridge.checkpoints._entries import CheckpointError, Path, Stored, is_empty
from nnx_bridge.checkpoints._layout import Linen, Nnx, find_layout
from nnx_bridge.weights import Plan


def remembered(entries: Mapping[Path, Any], layout: Linen) -> dict[str, Any]:
    """What an NNX checkpoint remembers of the Linen one it was made from, as JSON."""
    return {
        "layout": layout.name,
        "leaves": [[list(path), _kind(leaf)] for path, leaf in entries.items()],
    }


_EMPTY: dict[str, Any] = {"NoneType": None, "dict": {}, "list": [], "tuple": ()}
_PYTHON: dict[str, Any] = {"bool": False, "int": 0, "float": 0.0, "complex": 0j, "str": ""}


def _kind(leaf: Any) -> dict[str, Any]:
    if is_empty(leaf):
        return {"empty": type(leaf).__name__}
    if hasattr(leaf, "dtype"):
        return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    return {"python": type(leaf).__name__}


def planned(plan: Plan, layout: Nnx) -> tuple[dict[Path, Any], Linen]:
    """The structure of the variables that a plan was made for."""
    if layout.model:
        raise CheckpointError(
            "a plan does not say what a Linen train state is made of beside the variables; name a "
            "Linen checkpoint of such a run with like= (--like)"
        )
    used = {path for row in plan.rows for path in row.linen}
    leaves = (leaf for leaf in plan.linen if leaf.path in used and leaf.shape is not None)
    entries = {leaf.path: _nowhere(leaf.shape, leaf.dtype) for leaf in leaves}
    linen = find_layout(entries, "variables")
    assert isinstance(linen, Linen)
    return entries, linen


def recorded(structure: Mapping[str, Any]) -> tuple[dict[Path, Any], Linen]:
    """The inverse of `remembered`: leaves without arrays, and their layout."""
    entries = {tuple(path): _of_kind(kind) for path, kind in structure["leaves"]}
    layout = find_layout(entries, structure["layout"])
    assert isinstance(layout, Linen)
    return entries, layout


def _of_kind(kind: Mapping[str, Any]) -> Any:
    if "empty" in kind:
        return _EMPTY[kind["empty"]]
    if "python" in kind:
        return _PYTHON[kind["python"]]
    return _nowhere(kind["shape"], kind["dtype"])


def _nowhere(shape: Any, dtype: str) -> Stored:
    return Stored(_Nowhere(), (), tuple(shape), np.dtype(dtype))


class _Nowhere:
    """Of a remembered structure there are no arrays."""

    def read(self, arrays: Any) -> list[Any]:
        raise AssertionError("a structure has no arrays")

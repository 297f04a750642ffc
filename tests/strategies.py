"""What the property tests draw."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import linen as nn
from flax import struct
from flax.core import meta
from hypothesis import strategies as st


class Unit(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A user's box: a value and its physical unit."""

    value: Any
    unit: str = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Unit:
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Unit:
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Unit:
        return self


def linen_variables() -> st.SearchStrategy[dict[str, Any]]:
    """Variables of a Linen module: collections that share names, with boxes and plain values."""
    collections = st.sampled_from(["params", "ema", "cache", "intermediates"])
    return st.dictionaries(collections, _trees(_values()), min_size=1)


def _values() -> st.SearchStrategy[Any]:
    def forms(x: float) -> st.SearchStrategy[Any]:
        value = np.float32(x)
        return st.sampled_from([value, (value,), nn.Partitioned(value, ("a",)), Unit(value, "m")])

    return st.floats(allow_nan=False, width=32).flatmap(forms)


def _trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["w", "ema_w", "Dense_0", "_linen", "ema"])
    return st.recursive(
        st.dictionaries(names, leaves, min_size=1),
        lambda trees: st.dictionaries(names, trees | leaves, min_size=1),
        max_leaves=6,
    )

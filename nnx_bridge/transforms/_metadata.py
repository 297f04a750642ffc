"""Names of axes in the metadata of Variables, where a transform adds an axis or takes one away.

NNX keeps the names of the axes of a Variable in its metadata ``out_sharding``. A Variable that was
a metadata box in Linen (`flax.core.meta.AxisMetadata`) remembers the box, which has its own rule.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.core.meta import PARTITION_NAME

from lifted._errors import Path, path_text
from nnx_bridge._collections import BOX, with_box

Params = Mapping[Any, Any]


def axis_added(name: str, path: Path, leaf: Any, axis: int, params: Params) -> Any:
    """The Variable, whose value has the new axis already, with a name for it."""
    if not _has_names(leaf):
        return leaf
    new, index = _copy(leaf), _index(leaf, axis, 1)
    names = new.get_metadata("out_sharding", None)
    if names is None:
        return with_box(new, lambda box: box.add_axis(index, dict(params)))
    partition = _partition(name, path, names, params)
    padded = (*names, *(None,) * (index - len(names)))
    new.set_metadata(out_sharding=(*padded[:index], partition, *padded[index:]))
    new.add_axis(index, partition)
    return new


def axis_removed(name: str, path: Path, leaf: Any, axis: int, params: Params) -> Any:
    """The Variable, whose value has the axis still, without a name for it.

    Raises:
      ValueError: the axis has another name.
    """
    if not _has_names(leaf):
        return leaf
    new, index = _copy(leaf), _index(leaf, axis, 0)
    names = new.get_metadata("out_sharding", None)
    if names is None:
        return with_box(new, lambda box: box.remove_axis(index, dict(params)))
    partition = _partition(name, path, names, params)
    found = names[index] if index < len(names) else None
    if found != partition:
        raise ValueError(
            f"{name}: {path_text(path)}: axis {index} is called {found!r} in {names!r}, but "
            f"metadata_params says {partition!r}."
        )
    new.set_metadata(out_sharding=(*names[:index], *names[index + 1 :]))
    new.remove_axis(index, partition)
    return new


def _has_names(leaf: Any) -> bool:
    if not issubclass(type(leaf), nnx.Variable):
        return False
    # Asked first, as NNX copies all metadata to give out one.
    named = leaf.has_metadata("out_sharding") and leaf.get_metadata("out_sharding") is not None
    return named or leaf.has_metadata(BOX)


def _copy(leaf: nnx.Variable[Any]) -> nnx.Variable[Any]:
    copy: nnx.Variable[Any] = jax.tree.map(lambda x: x, leaf)
    return copy


def _index(leaf: nnx.Variable[Any], axis: int, missing: int) -> int:
    """The axis, counted from the first; ``missing`` axes have no name yet."""
    value = leaf.get_raw_value()
    names = leaf.get_metadata("out_sharding", None) or ()
    rank = np.ndim(value) if hasattr(value, "ndim") else len(names) + missing
    return axis if axis >= 0 else axis + rank


def _partition(name: str, path: Path, names: Any, params: Params) -> Any:
    if PARTITION_NAME not in params:
        raise ValueError(
            f"{name}: {path_text(path)} names its axes, {names!r}, so the lifted axis needs a name "
            f"too. Pass metadata_params={{nn.PARTITION_NAME: 'layers'}}, or None for no name."
        )
    return params[PARTITION_NAME]

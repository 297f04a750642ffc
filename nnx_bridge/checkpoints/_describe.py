"""What is in a checkpoint, without reading its arrays."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from nnx_bridge.checkpoints._entries import Entries, Path, is_empty, written
from nnx_bridge.checkpoints._mapping import RNGS
from nnx_bridge.checkpoints._source import open_source


@dataclasses.dataclass(frozen=True)
class ArrayDescription:
    """One array of a checkpoint.

    Attributes:
      path: Where it is.
      shape: Its shape.
      dtype: Its dtype.
      nbytes: Its bytes.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Description:
    """What is in a checkpoint; `rich.print` shows it as a table.

    Attributes:
      where: The folder or file that was found.
      format: `orbax`, `msgpack` or `safetensors`.
      layout: One of `LAYOUTS`.
      arrays: The arrays.
      others: Numbers and strings by their paths.
    """

    where: FilePath
    format: str
    layout: str
    arrays: tuple[ArrayDescription, ...]
    others: tuple[tuple[Path, Any], ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays)

    def __rich__(self) -> RenderableType:
        rows = Table(box=box.SIMPLE_HEAD)
        rows.add_column("path", overflow="fold")
        rows.add_column("array", no_wrap=True)
        rows.add_column("bytes", no_wrap=True, justify="right")
        for array in self.arrays:
            text = f"{array.dtype}[{', '.join(map(str, array.shape))}]"
            rows.add_row(Text(written(array.path)), Text(text), decimal(array.nbytes))
        for path, value in self.others:
            rows.add_row(Text(written(path)), Text(repr(value)), "")
        total = f"{len(self.arrays)} arrays, {decimal(self.nbytes)}"
        return Group(Text(f"{self.where}: {self.format}, {self.layout}, {total}"), rows)


def describe(
    path: str | os.PathLike[str], *, layout: str | None = None, item: str | None = None
) -> Description:
    """Lists what is in a checkpoint of Linen or NNX, and which layout it has.

    Use it to see what a file holds before it is converted or loaded. No array is read.

    Args:
      path: What `convert` takes as its source.
      layout: See `convert`.
      item: See `convert`.

    Returns:
      A description.

    Raises:
      CheckpointError: The checkpoint cannot be read, or has no known layout.

    Example:
        >>> import tempfile, numpy as np
        >>> from flax import serialization
        >>> file = FilePath(tempfile.mkdtemp()) / "weights"
        >>> _ = file.write_bytes(serialization.to_bytes({"params": {"w": np.ones((2, 3), "f4")}}))
        >>> found = describe(file)
        >>> found.format, found.layout, found.nbytes
        ('msgpack', 'variables', 24)
    """
    source = open_source(FilePath(path).resolve(), item=item, unsharded=True)
    entries = {**source.entries, **{(RNGS, *p): leaf for p, leaf in source.apart.items()}}
    return Description(
        source.where,
        source.format,
        source.layout(layout).name,
        tuple(_arrays(entries)),
        tuple((p, leaf) for p, leaf in entries.items() if not (is_empty(leaf) or _is_array(leaf))),
    )


def _arrays(entries: Entries) -> Sequence[ArrayDescription]:
    return [
        ArrayDescription(path, tuple(leaf.shape), str(leaf.dtype), leaf.nbytes)
        for path, leaf in entries.items()
        if _is_array(leaf)
    ]


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "nbytes")

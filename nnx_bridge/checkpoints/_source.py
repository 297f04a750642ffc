"""Opens whatever a path leads to: a checkpoint's folder, one of many steps, or a file."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path as FilePath
from typing import Any

from nnx_bridge.checkpoints._entries import CheckpointError, Path, Stored
from nnx_bridge.checkpoints._layout import Layout, Nnx, find_layout
from nnx_bridge.checkpoints._mapping import RNGS
from nnx_bridge.checkpoints._msgpack import MsgpackReader, is_msgpack
from nnx_bridge.checkpoints._orbax_reader import OrbaxReader, is_orbax
from nnx_bridge.checkpoints._publish import interrupted
from nnx_bridge.checkpoints._safetensors import SafetensorsReader

# What Hugging Face calls the weights of a Flax model.
_WEIGHTS = (
    "flax_model.msgpack",
    "flax_model.msgpack.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_flax_model.msgpack",
)
_STEP = re.compile(r"(?:.*_)?(\d+)$")


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that is open for reading.

    Attributes:
      where: the folder or file that was found.
      format: `orbax`, `msgpack` or `safetensors`.
      entries: its leaves.
      apart: leaves of random numbers, which a conversion has put aside.
      custom: what a conversion has left in its metadata.
    """

    where: FilePath
    format: str
    entries: dict[Path, Any]
    apart: dict[Path, Any] = dataclasses.field(default_factory=dict)
    custom: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The bytes of its arrays."""
        leaves = (*self.entries.values(), *self.apart.values())
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Stored))

    def layout(self, name: str | None = None) -> Layout:
        """Its layout: the one called `name`, the one that a conversion has noted, or what it looks
        like.

        Raises:
          CheckpointError: There is none.
        """
        noted = self.custom.get("nnx")
        if noted is None or name not in (None, noted["name"]):
            return find_layout(self.entries, name)
        model, optimizer = noted["model"], noted["optimizer"]
        return Nnx(noted["name"], tuple(model), optimizer and tuple(optimizer), noted["pure"])


def open_source(path: FilePath, *, item: str | None = None, unsharded: bool = False) -> Source:
    """Opens a checkpoint.

    Args:
      path: See `convert`.
      item: The item, where a checkpoint has several.
      unsharded: Whether arrays are read onto one device.

    Raises:
      CheckpointError: There is no checkpoint, or it is damaged.
    """
    found = locate(path, item)
    if found.is_dir():
        reader = OrbaxReader(found, unsharded=unsharded)
        apart: dict[Path, Any] = {}
        if is_orbax(found / RNGS):
            apart = OrbaxReader(found / RNGS, unsharded=unsharded).entries
        custom = (reader.custom or {}).get("flaxlift", {})
        return Source(found, "orbax", reader.entries, apart, custom)
    if found.name.endswith(".index.json"):
        return _indexed(found)
    if found.suffix == ".safetensors":
        return Source(found, "safetensors", SafetensorsReader(found).entries)
    with found.open("rb") as stream:
        head = stream.read(1)
    if head and not is_msgpack(head):
        raise CheckpointError(
            f"{found} is neither safetensors nor a file of flax.serialization (it begins with the "
            f"byte {head[0]:#x})"
        )
    return Source(found, "msgpack", MsgpackReader(found).entries)


def locate(path: FilePath, item: str | None = None) -> FilePath:
    """The checkpoint's own folder or file.

    Raises:
      CheckpointError: There is none, or there are several items and none is named.
    """
    if not path.exists():
        old = interrupted(path)
        hint = f"; a conversion that was to replace it was killed, {old} is the old one"
        raise CheckpointError(f"{path} does not exist{hint if old else ''}")
    if path.is_file() or is_orbax(path):
        if item not in (None, path.name):
            raise CheckpointError(f"{path} is a checkpoint itself and has no item {item!r}")
        return path
    inside = sorted(child for child in path.iterdir() if not child.name.startswith("."))
    for name in _WEIGHTS:
        if (path / name).is_file():
            return path / name
    items = [child for child in inside if is_orbax(child)]
    if item is not None:
        items = [child for child in items if child.name == item]
        if not items and not _steps(inside):
            raise CheckpointError(f"{path} has no item {item!r}; it has {_names(inside)}")
    steps = _steps(inside)
    if steps and (not items or items == steps):
        # Of the steps that a CheckpointManager keeps, the last.
        return locate(steps[-1], item)
    if len(items) == 1:
        return items[0]
    if items:
        raise CheckpointError(f"{path} has several items ({_names(items)}); say which with item=")
    unfinished = [child for child in inside if "orbax-checkpoint-tmp" in child.name]
    if unfinished or "orbax-checkpoint-tmp" in path.name:
        raise CheckpointError(f"{path} holds only a checkpoint whose saving was interrupted")
    if (path / "checkpoint").is_file():
        raise CheckpointError(
            f"{path} was written by an Orbax that kept no metadata; restore and save it again with "
            "a newer one"
        )
    raise CheckpointError(f"{path} is no checkpoint of Orbax or Flax; it holds {_names(inside)}")


def _steps(folders: list[FilePath]) -> list[FilePath]:
    numbered = [(int(m[1]), f) for f in folders if (m := _STEP.match(f.name))]
    return [folder for _, folder in sorted(numbered)]


def _names(children: list[FilePath]) -> str:
    names = [child.name for child in children]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"


def _indexed(index: FilePath) -> Source:
    """Weights in several files, with a list of what is where."""
    try:
        weights: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weights.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of weights: {error}") from error
    entries: dict[Path, Any] = {}
    for name in files:
        file = index.parent / name
        if not file.is_file():
            raise CheckpointError(f"{index} names {name}, which is not beside it")
        kind = SafetensorsReader if file.suffix == ".safetensors" else MsgpackReader
        entries.update(kind(file).entries)
    there = {"/".join(map(str, path)) for path in entries}
    lacking = [
        name for name in weights if name.replace(".", "/") not in there and name not in there
    ]
    if lacking:
        raise CheckpointError(f"{index} names {', '.join(lacking[:8])}, which no file has")
    kind_of = "safetensors" if files and files[0].endswith(".safetensors") else "msgpack"
    return Source(index, kind_of, entries)

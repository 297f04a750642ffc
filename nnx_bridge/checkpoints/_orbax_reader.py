"""Orbax checkpoints, whose arrays are read when they are needed."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import json
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from nnx_bridge.checkpoints._entries import (
    CheckpointError,
    Path,
    Stored,
    first_line,
    flat,
    is_empty,
    written,
)

METADATA = "_METADATA"


class OrbaxReader:
    """Reads one Orbax checkpoint.

    Args:
      folder: The folder that has the metadata file.
      unsharded: Whether arrays are read onto one device, however they were saved.

    Raises:
      CheckpointError: The checkpoint cannot be read, or was saved on devices that are not here.
    """

    def __init__(self, folder: FilePath, *, unsharded: bool = False) -> None:
        self.folder = folder
        with _named(folder, "the metadata"):
            metadata = self._metadata()
        self.custom = metadata.custom_metadata
        self.entries: dict[Path, Any] = {}
        # What all arrays have in common for Orbax.
        self._common = {
            "parent_dir": epath.Path(folder),
            "is_ocdbt_checkpoint": ocp.type_handlers.is_ocdbt_checkpoint(epath.Path(folder)),
            "use_zarr3": metadata.use_zarr3,
        }
        shardings: dict[str, Any] = {}
        for path, leaf in flat(metadata.tree):
            if is_empty(leaf):
                self.entries[path] = leaf
            elif isinstance(leaf, ocp.metadata.ArrayMetadata) and not _is_scalar(leaf):
                sharding = None if unsharded else _sharding(leaf.sharding, shardings, folder)
                kind: Any = np.ndarray if leaf.sharding is None else jax.Array
                key = (leaf.name, kind)
                numpy = kind is np.ndarray
                array = Stored(self, path, tuple(leaf.shape), leaf.dtype, sharding, key, numpy)
                self.entries[path] = array
            else:
                kind = int if _is_scalar(leaf) else str
                scalar = Stored(self, path, (), np.dtype(int), None, (leaf.name, kind))
                self.entries[path] = scalar.load()

    def read(self, arrays: Sequence[Stored]) -> list[Any]:
        result: dict[Path, Any] = {}
        for kind in {array.key[1]: None for array in arrays}:
            mine = [array for array in arrays if array.key[1] is kind]
            # The database is opened once for all of them; what it caches goes with the context.
            common = {**self._common, "ts_context": ocp.type_handlers.get_ts_context()}
            infos = [ocp.type_handlers.ParamInfo(name=array.key[0], **common) for array in mine]
            handler = ocp.type_handlers.get_type_handler(kind)
            what = written(mine[0].path) + (" and others" if len(mine) > 1 else "")
            with _named(self.folder, what):
                read = self._run(handler.deserialize(infos, [_restore_args(a) for a in mine]))
            result.update({array.path: value for array, value in zip(mine, read, strict=True)})
        return [result[array.path] for array in arrays]

    def _run(self, reading: Coroutine[Any, Any, Any]) -> Any:
        """Runs what Orbax does asynchronously."""
        return _reader_thread().submit(asyncio.run, _to_the_end(reading)).result()

    def _metadata(self) -> Any:
        with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as checkpointer:
            metadata = checkpointer.metadata(self.folder).item_metadata
        if metadata is None:
            raise ValueError("Orbax finds none")
        return metadata


async def _to_the_end(reading: Coroutine[Any, Any, Any]) -> Any:
    """What is read, once all that reads is done: after a failure the reads beside it go on, and
    would complain of a loop that is closed."""
    try:
        return await reading
    finally:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)


@functools.cache
def _reader_thread() -> concurrent.futures.Executor:
    """The thread in which Orbax reads.

    The caller may be in an event loop already, as notebooks are. There is one thread for all reads,
    since memory that a thread has freed stays with it.
    """
    return concurrent.futures.ThreadPoolExecutor(1)


def is_orbax(folder: FilePath) -> bool:
    """Whether a folder is a checkpoint of Orbax."""
    return (folder / METADATA).is_file()


def _restore_args(array: Stored) -> Any:
    if array.key[1] is not jax.Array:
        return ocp.RestoreArgs()
    sharding = array.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)


def _is_scalar(leaf: Any) -> bool:
    return isinstance(leaf, ocp.metadata.ScalarMetadata)


def _sharding(saved: Any, known: dict[str, Any], folder: FilePath) -> Any:
    if saved is None or type(saved).__name__ == "SingleDeviceShardingMetadata":
        return None
    key = repr(saved)
    if key not in known:
        try:
            known[key] = saved.to_jax_sharding()
        except Exception as error:
            raise CheckpointError(
                f"{folder} holds arrays that lie on devices that are not here "
                f"({len(jax.devices())} {jax.devices()[0].platform} are): {first_line(error)}. "
                "Simulate them with jax.config.update('jax_num_cpu_devices', <number>), or "
                "read the arrays onto one device with unsharded=True (--unsharded)"
            ) from error
    return known[key]


def saved_devices(folder: FilePath) -> int:
    """How many devices the arrays of a checkpoint lie on, found without starting JAX."""
    file = folder / "_sharding"
    if not file.is_file():
        return 1
    with contextlib.suppress(ValueError, OSError):
        shardings = json.loads(file.read_text(encoding="utf-8")).values()
        return max((_devices(json.loads(text)) for text in shardings), default=1)
    return 1


def _devices(sharding: Mapping[str, Any]) -> int:
    shape = sharding.get("shape")
    return int(np.prod(shape)) if shape else 1


@contextlib.contextmanager
def _named(folder: FilePath, what: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder} cannot be read: {what}: {type(error).__name__}: {first_line(error)}"
        ) from error

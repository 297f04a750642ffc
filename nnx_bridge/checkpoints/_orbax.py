"""Orbax checkpoints, read and written a few arrays at a time.

Orbax saves a whole tree of arrays that are all in memory. Here the leaves of the tree that it saves
are promises: the handler of their type reads as many arrays as fit into the limit, lets Orbax's
own handler write them, and goes on. So the memory needed is that of the largest array or of the
limit, whichever is more, and what is written is what Orbax would have written.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ctypes
import functools
import json
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from nnx_bridge.checkpoints._entries import (
    CheckpointError,
    Entries,
    Path,
    Stored,
    batches,
    first_line,
    flat,
    is_empty,
    nested,
    read_all,
    written,
)

METADATA = "_METADATA"
# Arrays are in memory together up to this many bytes: large enough to keep the disk busy.
LIMIT = 64 * 2**20

Progress = Callable[[int, str], None]  # Bytes more that are done, and what they are.


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


def write(folder: FilePath, entries: Entries, custom: Any, progress: Progress) -> None:
    """Writes a checkpoint.

    Args:
      folder: Where; must not exist.
      entries: Its leaves.
      custom: JSON kept with the metadata.
      progress: Called after each group of arrays.
    """
    failures: list[Exception] = []
    plain = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    # Orbax's own, which also keeps the books that its metadata are made from.
    arrays = ocp.type_handlers.get_type_handler(jax.Array)
    scalars = ocp.type_handlers.ScalarHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        *((kind, scalars) for kind in (int, float, np.number)),
        (str, ocp.type_handlers.StringHandler()),
        (np.ndarray, plain),
        (jax.Array, arrays),
        (_Array, _PromisedHandler(arrays, progress, failures)),
        (_Numpy, _PromisedHandler(plain, progress, failures)),
    )
    tree = nested({path: _promised(path, leaf) for path, leaf in entries.items()})
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    try:
        with contextlib.closing(ocp.Checkpointer(handler)) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, custom_metadata=custom))
    except Exception:
        if not failures:
            raise
    if failures:
        raise failures[0]


def _from_numpy(array: Stored) -> bool:
    """Whether an array is to be written as one of NumPy: it was, or JAX cannot hold its 64 bits."""
    if array.numpy is not None:
        return array.numpy
    return np.dtype(array.dtype) != jax.dtypes.canonicalize_dtype(array.dtype)


# Two classes, neither of which derives from the other: a registry goes by `issubclass`.
class _Promise:
    """An array that is read when it is written."""

    def __init__(self, path: Path, array: Any) -> None:
        self.path = path
        self.array = array
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes


class _Array(_Promise):
    """One that is an array of JAX."""


class _Numpy(_Promise):
    """One that is an array of NumPy."""


class _PromisedHandler(ocp.type_handlers.TypeHandler):
    """Writes promised arrays with the handler of their type.

    An array that cannot be read goes to `failures`, not to Orbax: that would give up at once and
    leave the writers of the other types at work in a folder which the caller is about to remove.
    """

    def __init__(self, handler: Any, progress: Progress, failures: list[Exception]) -> None:
        self._handler = handler
        self._progress = progress
        self._failures = failures

    def typestr(self) -> str:
        return self._handler.typestr()

    async def metadata(self, infos: Any) -> Any:
        return await self._handler.metadata(infos)

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        return await self._handler.deserialize(infos, args)

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
        args = args or [ocp.type_handlers.SaveArgs()] * len(values)
        for group in batches(list(zip(values, infos, args, strict=True)), LIMIT, _size):
            try:
                loaded = await asyncio.to_thread(_load, group)
            except Exception as error:
                self._failures.append(error)
                break
            _give_back_memory()
            _, infos, args = zip(*group, strict=True)
            for commit in await self._handler.serialize(loaded, infos, args):
                await asyncio.to_thread(commit.result)
            del loaded, commit
            _give_back_memory()
            for value, *_ in group:
                self._progress(value.nbytes, written(value.path))
        return []


def _size(leaf: tuple[_Promise, Any, Any]) -> int:
    return leaf[0].nbytes


def _promised(path: Path, leaf: Any) -> Any:
    if isinstance(leaf, Stored):
        return (_Numpy if _from_numpy(leaf) else _Array)(path, leaf)
    # What is in memory too: two writers of JAX's arrays would write one file of Orbax's books.
    return _Array(path, leaf) if isinstance(leaf, jax.Array) else leaf


def _load(group: Sequence[tuple[_Promise, Any, Any]]) -> list[Any]:
    arrays = read_all([value.array for value, *_ in group])
    return [
        array if isinstance(value, _Numpy) else jax.numpy.asarray(array)
        for (value, *_), array in zip(group, arrays, strict=True)
    ]


def _give_back_memory() -> None:
    """Returns freed memory to the system: glibc keeps some for each of the many threads of Orbax,
    which adds up to several times the arrays that are in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


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

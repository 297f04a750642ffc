"""Orbax checkpoints, written a few arrays at a time.

Orbax saves a whole tree of arrays that are all in memory. Here the leaves of the tree that it saves
are promises: the handler of their type reads as many arrays as fit into the limit, lets Orbax's
own handler write them, and goes on. So the memory needed is that of the largest array or of the
limit, whichever is more, and what is written is what Orbax would have written.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import sys
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nnx_bridge.checkpoints._entries import (
    Entries,
    Path,
    Stored,
    batches,
    nested,
    read_all,
    written,
)

# Arrays are in memory together up to this many bytes: large enough to keep the disk busy.
LIMIT = 64 * 2**20

Progress = Callable[[int, str], None]  # Bytes more that are done, and what they are.


def write_orbax(folder: FilePath, entries: Entries, custom: Any, progress: Progress) -> None:
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

"""Files of `flax.serialization`, read and written one array at a time.

Flax decodes such a file as a whole. Here its maps are walked, each array is decoded once to check
that it is what it says, and again when it is needed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import msgpack
import numpy as np
from flax import serialization

from nnx_bridge.checkpoints._entries import (
    CheckpointError,
    Entries,
    Path,
    Stored,
    is_empty,
    loaded,
    nested,
    written,
)

# By these Flax marks arrays (in three ways) and arrays that are cut into several.
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK_BYTES = 2**30
_LARGEST = 2**31 - 1


class MsgpackReader:
    """Reads one file of `flax.serialization.to_bytes`.

    Raises:
      CheckpointError: The file is not one, or is damaged.
    """

    def __init__(self, file: FilePath) -> None:
        self.file = file
        self.entries: dict[Path, Any] = {}
        if file.stat().st_size == 0:
            raise CheckpointError(f"{file} is empty")
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if not is_msgpack(data[:1]):
                raise CheckpointError(f"{file} is no file of flax.serialization: it holds no dict")
            try:
                end = self._scan(data, 0, ())
            except CheckpointError:
                raise
            except Exception as error:
                raise CheckpointError(self._damage(error)) from error
            if end != len(data):
                raise CheckpointError(f"{file} is damaged: {len(data) - end} bytes follow its end")

    def read(self, arrays: Sequence[Stored]) -> list[Any]:
        with self.file.open("rb") as stream:
            return [self._read(stream, array) for array in arrays]

    def _read(self, stream: Any, array: Stored) -> Any:
        pieces = []
        for offset, size in array.key:
            stream.seek(offset)
            pieces.append(_decode(stream.read(size)))
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return whole.reshape(array.shape)

    def _scan(self, data: mmap.mmap, offset: int, path: Path) -> int:
        """Enters what begins at ``offset``; returns where it ends."""
        if not is_msgpack(data[offset : offset + 1]):
            value, end = _unpack(data, offset, self.file, path)
            self._enter(path, value, (offset, end - offset))
            return end
        length, offset = _map_header(data, offset)
        if length == 0:
            self.entries[path] = {}
        chunked = False
        for _ in range(length):
            key, offset = _unpack(data, offset, self.file, path)
            if not isinstance(key, str | int):
                raise CheckpointError(
                    f"{self.file} is damaged: a key at {written(path)} is {key!r}"
                )
            chunked |= key == _CHUNKED
            if (*path, str(key)) in self.entries:
                raise CheckpointError(
                    f"{self.file} is damaged: {written((*path, key))} is there twice"
                )
            offset = self._scan(data, offset, (*path, str(key)))
        if chunked:
            self._join(path)
        return offset

    def _enter(self, path: Path, value: Any, where: tuple[int, int]) -> None:
        if isinstance(value, np.ndarray):
            value = Stored(self, path, value.shape, value.dtype, key=(where,))
        elif isinstance(value, msgpack.ExtType):
            raise CheckpointError(
                f"{self.file}: {written(path)} is of a type that Flax does not know"
            )
        self.entries[path] = value

    def _join(self, path: Path) -> None:
        parts = {p: v for p, v in self.entries.items() if p[: len(path)] == path}
        tree = nested({p[len(path) :]: v for p, v in parts.items()})
        for p in parts:
            del self.entries[p]
        shape = tuple(tree["shape"][str(i)] for i in range(len(tree["shape"])))
        chunks = [tree["chunks"][str(i)] for i in range(len(tree["chunks"]))]
        if sum(chunk.shape[0] for chunk in chunks) != np.prod(shape, dtype=np.int64):
            raise CheckpointError(f"{self.file} is damaged: pieces of {written(path)} are missing")
        where = tuple(chunk.key[0] for chunk in chunks)
        self.entries[path] = Stored(self, path, shape, chunks[0].dtype, key=where)

    def _damage(self, error: Exception) -> str:
        last = written(next(reversed(self.entries), ()))
        after = f" after {last}" if self.entries else ""
        reason = str(error) or type(error).__name__
        return f"{self.file} is damaged or cut off{after}: {reason}"


def is_msgpack(head: bytes) -> bool:
    """Whether a dict begins with these bytes."""
    return bool(head) and (0x80 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF))


def _map_header(data: mmap.mmap, offset: int) -> tuple[int, int]:
    if data[offset] < 0x90:
        return data[offset] & 0x0F, offset + 1
    size = 2 if data[offset] == 0xDE else 4
    header = data[offset + 1 : offset + 1 + size]
    if len(header) < size:
        raise ValueError("the file ends in it")
    return int.from_bytes(header, "big"), offset + 1 + size


def _unpack(data: mmap.mmap, offset: int, file: FilePath, path: Path) -> tuple[Any, int]:
    """What begins at ``offset``, which is no map, and where it ends."""
    size = _size(data, offset)
    piece = data[offset : offset + size]
    if len(piece) < size:
        raise CheckpointError(f"{file} is cut off in {written(path)}")
    return _decode(piece), offset + size


def _size(data: mmap.mmap, offset: int) -> int:
    """The bytes of a value that is no map, from its first ones."""
    head = data[offset]
    # The bytes of the length that follow, and those of an extension's type.
    for first, extra in ((0xC4, 0), (0xC7, 1), (0xD9, 0)):
        if first <= head <= first + 2:
            width = 1 << (head - first)
            length = int.from_bytes(data[offset + 1 : offset + 1 + width], "big")
            return 1 + width + extra + length
    if 0xD4 <= head <= 0xD8:
        return 2 + (1 << (head - 0xD4))
    if 0xA0 <= head <= 0xBF:
        return 1 + (head & 0x1F)
    fixed = {0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9}
    fixed |= {0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9, 0xC0: 1, 0xC2: 1, 0xC3: 1}
    if head in fixed:
        return fixed[head]
    if head < 0x80 or head >= 0xE0:
        return 1
    raise ValueError(f"a byte {head:#x} where a value should begin")


def _decode(piece: bytes) -> Any:
    return msgpack.unpackb(
        piece, raw=False, strict_map_key=False, ext_hook=_extension, max_ext_len=len(piece)
    )


def _extension(code: int, data: bytes) -> Any:
    if code == _COMPLEX:
        return complex(*msgpack.unpackb(data))
    if code not in (_ARRAY, _SCALAR):
        return msgpack.ExtType(code, data)
    shape, name, buffer = msgpack.unpackb(data, raw=True, max_bin_len=len(data))
    dtype = jax.numpy.dtype(name.decode())
    array = np.frombuffer(buffer, dtype).reshape(shape)
    return array if code == _ARRAY else array[()]


def write_msgpack(file: FilePath, entries: Entries, progress: Any) -> None:
    """Writes a file that `flax.serialization.msgpack_restore` reads."""
    with file.open("wb") as stream:
        for piece in _pack(nested({tuple(map(str, p)): v for p, v in entries.items()}), progress):
            stream.write(piece)


def _pack(tree: Any, progress: Any) -> Iterator[bytes]:
    if isinstance(tree, Mapping):
        yield msgpack.Packer().pack_map_header(len(tree))
        for key, value in tree.items():
            yield msgpack.packb(key)
            yield from _pack(value, progress)
    elif is_empty(tree):
        yield msgpack.packb({})
    else:
        value = loaded(tree)
        if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
            # Flax keeps keys as the integers that they are made of.
            value = jax.random.key_data(value)
        yield serialization.msgpack_serialize(
            {"": np.asarray(value) if isinstance(tree, Stored) else value}
        )[2:]
        if isinstance(tree, Stored):
            progress(tree.nbytes, written(tree.path))

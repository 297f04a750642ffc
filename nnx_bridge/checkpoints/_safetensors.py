"""Weights in safetensors, as Hugging Face saves those of Flax models: names joined by dots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nnx_bridge.checkpoints._entries import CheckpointError, Entries, Path, Stored, loaded, written

_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "BOOL": "bool",
    **{
        f"{kind}{bits}": f"{name}{bits}"
        for kind, name in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
}


class SafetensorsReader:
    """Reads one safetensors file.

    Raises:
      CheckpointError: The file is damaged, or holds the weights of another framework.
    """

    def __init__(self, file: FilePath) -> None:
        self.file = file
        try:
            # Flax's arrays, since NumPy has no bfloat16.
            with safe_open(file, framework="flax") as tensors:
                metadata = tensors.metadata() or {}
                self.entries = {self._path(n): self._stored(n, tensors) for n in tensors.keys()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error
        if metadata.get("format") in ("pt", "tf", "mlx"):
            raise CheckpointError(
                f"{file} holds weights of another framework (format {metadata['format']!r}); load "
                "them into the Flax model with from_pt=True and save it, then convert that"
            )

    def read(self, arrays: Sequence[Stored]) -> list[Any]:
        with safe_open(self.file, framework="flax") as tensors:
            return [tensors.get_tensor(array.key) for array in arrays]

    def _path(self, name: str) -> Path:
        return tuple(name.split("." if "/" not in name else "/"))

    def _stored(self, name: str, tensors: Any) -> Stored:
        piece = tensors.get_slice(name)
        code = piece.get_dtype()
        if code not in _DTYPES:
            raise CheckpointError(f"{self.file}: {name} has the dtype {code}, which JAX has not")
        dtype = jax.numpy.dtype(_DTYPES[code])
        return Stored(self, self._path(name), tuple(piece.get_shape()), dtype, key=name)


def write_safetensors(file: FilePath, entries: Entries, progress: Any) -> None:
    """Writes parameters, all of which the format's library needs in memory."""
    arrays = {}
    for path, leaf in entries.items():
        if any("." in str(part) for part in path):
            raise CheckpointError(
                f"{written(path)} has a dot in a name, which safetensors cannot keep"
            )
        arrays[".".join(map(str, path))] = np.ascontiguousarray(loaded(leaf))
        progress(arrays[".".join(map(str, path))].nbytes, written(path))
    save_file(arrays, file, metadata={"format": "flax"})

"""Checkpoints on disk, written and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.helpers import assert_trees_equal


def save(folder: Path, tree: Any) -> Path:
    """Saves as most users do."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def restore(folder: Path, target: Any) -> Any:
    """Restores into a structure that must fit exactly."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, target)


def metadata(folder: Path) -> dict[str, Any]:
    """What Orbax keeps of the structure: keys, their types, and types of values."""
    content: dict[str, Any] = json.loads((folder / "_METADATA").read_text())["tree_metadata"]
    return content


def assert_same_checkpoint(actual: Path, expected: Path) -> None:
    """The same structure to the letter, and the same arrays."""
    assert metadata(actual) == metadata(expected)
    trees = [ocp.PyTreeCheckpointer().restore(folder) for folder in (actual, expected)]
    assert_trees_equal(*trees)


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def abstract(tree: Any) -> Any:
    """Shapes and dtypes, as a target for restoring."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)

"""Checkpoints come into their place when they are complete, or not at all.

What is written goes into a hidden folder beside the destination, which a rename then makes the
destination. A folder cannot be renamed over another, so an old destination is moved into the hidden
folder first. Whoever is killed between the two leaves the old one there, and the next run for the
same destination puts it back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from nnx_bridge.checkpoints._entries import CheckpointError, first_line

_NEW, _OLD = "new", "old"


@contextlib.contextmanager
def published(destination: Path, force: bool) -> Iterator[Path]:
    """Where to write what then becomes the destination, if all went well.

    Args:
      destination: Its place.
      force: Whether what is there is replaced.

    Raises:
      CheckpointError: It could not be written; the destination is as it was.
    """
    # Never the same folder twice: writers of a run that failed may still be at work in theirs.
    name = f"{_prefix(destination)}{os.getpid()}-{time.monotonic_ns()}"
    folder = destination.parent / name
    try:
        folder.mkdir()
        yield folder / _NEW
        _put(folder / _NEW, destination, folder / _OLD if force else None)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{destination} could not be written: {type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        _put_back(folder, destination)
        _remove(folder)


def sweep(destination: Path) -> None:
    """Undoes what earlier runs for the same destination left that failed or were killed."""
    for folder in _left(destination):
        pid = folder.name.removeprefix(_prefix(destination)).partition("-")[0]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            _put_back(folder, destination)
            shutil.rmtree(folder, ignore_errors=True)


def interrupted(destination: Path) -> Path | None:
    """Where the old destination is, if a run was killed before the new one was in its place."""
    olds = (folder / _OLD for folder in _left(destination))
    return next((old for old in olds if os.path.lexists(old)), None)


def _put(new: Path, destination: Path, old: Path | None) -> None:
    if os.path.lexists(destination):
        if old is None:
            raise CheckpointError(f"{destination} exists by now; force=True (--force) replaces it")
        if new.is_dir() or (destination.is_dir() and not destination.is_symlink()):
            os.replace(destination, old)
    os.replace(new, destination)


def _put_back(folder: Path, destination: Path) -> None:
    if os.path.lexists(folder / _OLD) and not os.path.lexists(destination):
        os.replace(folder / _OLD, destination)


def _prefix(destination: Path) -> str:
    return f".{destination.name}.flaxlift-"


def _left(destination: Path) -> list[Path]:
    if not destination.parent.is_dir() or not os.access(destination.parent, os.R_OK):
        return []
    return [p for p in destination.parent.iterdir() if p.name.startswith(_prefix(destination))]


def _remove(folder: Path) -> None:
    """Removes a folder in which writers that failed may be at work for another moment."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

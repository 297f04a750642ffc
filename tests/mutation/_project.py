"""Copies of the project, and pytest in them.

A process that has imported JAX and Flax, but nothing of ours, forks one for each run of pytest, so
that a run does not begin with seconds of imports.
"""

from __future__ import annotations

import compileall
import hashlib
import multiprocessing
import os
import platform
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from py_compile import PycInvalidationMode

import flax
import jax
import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}"
_PACKAGES = ("lifted", "nnx_bridge", "layers")
_FOLDERS = (*_PACKAGES, "tests", "examples", "docs")
_FILES = ("conftest.py", "pyproject.toml", "README.md")
_IMPORTED = (
    "chex flax.linen flax.nnx hypothesis jax.numpy matplotlib.pyplot optax orbax.checkpoint "
    "pytest rich.console safetensors.numpy scipy.stats typer"
)
_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(_IMPORTED.split())


def digest() -> str:
    """A name for the project as it is: its files, and the versions of what it runs on."""
    found = hashlib.sha256(VERSIONS.encode())
    files = [path for name in _FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()]
    for path in sorted([*files, *(ROOT / name for name in _FILES)]):
        if path.suffix in (".py", ".md", ".toml"):
            found.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def copy_project(target: Path) -> None:
    """Copies what the tests need to ``target``, compiled."""
    ignored = shutil.ignore_patterns("__pycache__", "*.png")
    for name in _FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for name in _FILES:
        shutil.copy(ROOT / name, target / name)
    for name in _PACKAGES:
        # By the hash of the source: a fault may come within the second that a time stamp tells.
        mode = PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(target / name, quiet=2, invalidation_mode=mode)


def run_tests(
    project: Path, tests: Sequence[str], limit: float | None = None
) -> tuple[int | None, str]:
    """Exit status and output of pytest in a copy of the project, up to the first test that fails.

    The status is None where it has not ended after ``limit`` seconds.
    """
    process = _forked.Process(target=_pytest, args=(project, tests), daemon=False)
    process.start()
    process.join(limit)
    if ended := process.exitcode is not None:
        process.join()
    else:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode if ended else None, _said(project).read_text(errors="replace")


def _pytest(project: Path, tests: Sequence[str]) -> None:
    """Runs in a process of its own."""
    os.setsid()  # With what the tests start, so that it can be ended as a whole.
    output = os.open(_said(project), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(project)
    sys.path.insert(0, str(project))
    sys.dont_write_bytecode = True
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # That of the copy is imported.
    os.environ |= {
        "PYTHONPATH": str(project),
        "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "200",  # Of pytest's summary, so that a line of it says what was raised.
    }
    options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "--tb=line", "-rfE"]
    status = pytest.main([*options, *tests])
    # Without what a process does at its end: it has said all.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _said(project: Path) -> Path:
    return project / "output.txt"

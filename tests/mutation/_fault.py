"""A fault: a small replacement in one file, and the tests that have to fail."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_COPIED = ("lifted", "nnx_bridge", "layers", "tests", "examples", "docs")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with the project once ``old`` is replaced by ``new``.

    Attributes:
      what: the mistake, in words.
      file: path of the file from the root of the project.
      old: text that stands in the file exactly once.
      new: text that takes its place.
      tests: what is given to pytest to notice it.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str

    def planted(self, source: str) -> str:
        """``source`` with the fault.

        Raises:
          ValueError: the text is not there once: the fault has to be written anew.
        """
        count = source.count(self.old)
        if count != 1:
            raise ValueError(
                f"{self.file}: {self.what!r}: the text to replace is there {count} times, not "
                f"once; write the fault for the code as it is now:\n{self.old}"
            )
        return source.replace(self.old, self.new)


def copy_project(target: Path) -> None:
    """Copies what the tests need to ``target``."""
    for name in _COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "*.png")
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for name in ("conftest.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, target / name)


def run_tests(project: Path, tests: str) -> tuple[int, str]:
    """Exit status and output of pytest for ``tests`` in a copy of the project."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider"]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        **os.environ,
        "PYTHONPATH": str(project),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [*command, *tests.split()],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr

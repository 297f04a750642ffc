"""A fault: a small replacement in one file, and the test that has to fail."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
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
      test: what pytest calls the test that has to fail. The whole suite would notice more; one test
        that says what is wrong makes it quick to run all faults.
    """

    what: str
    file: str
    old: str
    new: str
    test: str

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


def run_tests(project: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit status and output of pytest in a copy of the project, up to the first test that fails.

    The copies share what JAX has compiled with the project itself.
    """
    options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "--tb=line", "-rfE"]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        **os.environ,
        "PYTHONPATH": str(project),
        "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "200",  # Of pytest's summary, so that a line of it says what was raised.
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr

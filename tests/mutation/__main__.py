"""Plants every fault and prints which of them the tests notice; exit status 1 if not all."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.mutation._fault import ROOT, Fault, copy_project, run_tests
from tests.mutation._faults import FAULTS

_STATES = {0: "[red]survived[/]", 1: "caught"}


def main(words: Sequence[str]) -> int:
    """Runs the faults whose file or description has one of ``words``; all without any."""
    console = Console()
    chosen = [f for f in FAULTS if not words or any(w in f"{f.file} {f.what}" for w in words)]
    # All of them are read before the first is planted.
    sources = {fault: fault.planted((ROOT / fault.file).read_text()) for fault in chosen}
    with tempfile.TemporaryDirectory() as directory:
        project = Path(directory)
        copy_project(project)
        console.print("The tests, without a fault:")
        for tests in track(sorted({fault.tests for fault in chosen}), console=console):
            status, output = run_tests(project, tests)
            if status != 0:
                console.print(f"{tests} does not pass without a fault:\n{output}", markup=False)
                return 2
        console.print(f"{len(chosen)} faults, one at a time:")
        results = {
            fault: _status(project, fault, source)
            for fault, source in track(sources.items(), total=len(sources), console=console)
        }
    table = Table("file", "fault", "tests", "")
    for fault, status in results.items():
        table.add_row(
            fault.file, fault.what, fault.tests, _STATES.get(status, f"[red]pytest: {status}[/]")
        )
    console.print(table)
    caught = sum(status == 1 for status in results.values())
    console.print(f"{caught} of {len(results)} faults are caught.")
    return 0 if caught == len(results) else 1


def _status(project: Path, fault: Fault, source: str) -> int:
    path = project / fault.file
    original = path.read_text()
    path.write_text(source)
    try:
        return run_tests(project, fault.tests)[0]
    finally:
        path.write_text(original)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

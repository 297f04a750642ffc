"""Plants every fault and tells which of them the tests notice; exit status 1 if not all."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import queue
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flax
import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from tests.mutation._fault import ROOT, Fault, copy_project, run_tests
from tests.mutation.faults import FAULTS


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What became of a fault: the exit status of pytest, what it said, and the seconds."""

    fault: Fault
    status: int
    said: str
    seconds: float

    @property
    def caught(self) -> bool:
        return self.status == 1  # A test failed; pytest has others for what is no test.


def main(words: Sequence[str], workers: int) -> int:
    """Runs the faults whose file or description has one of ``words``; all without any."""
    console = Console(highlight=False)
    chosen = [f for f in FAULTS if not words or any(w in f"{f.file} {f.what}" for w in words)]
    # All of them are read before the first is planted.
    sources = [fault.planted((ROOT / fault.file).read_text()) for fault in chosen]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(workers) as pool:
        free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for worker in range(workers):
            project = Path(directory) / str(worker)
            copy_project(project)
            free.put(project)
        tests = sorted({fault.test for fault in chosen})
        console.print(f"{len(tests)} tests, without a fault")
        status, output = run_tests(project, tests)
        if status != 0:
            console.print(f"They do not pass:\n{output}", markup=False)
            return 2

        def outcome(fault: Fault, source: str) -> _Outcome:
            project = free.get()
            try:
                return _outcome(project, fault, source)
            finally:
                free.put(project)

        console.print(f"{len(chosen)} faults, one at a time in {workers} copies of the project")
        outcomes = []
        running = pool.map(outcome, chosen, sources)
        for done in track(running, total=len(chosen), console=console):
            outcomes.append(done)
            state = "caught" if done.caught else "[red]survived[/]"
            where = f"{state} {done.seconds:5.1f} s  {done.fault.file}: {done.fault.what}"
            console.print(f"{where}\n    {escape(done.said)}", soft_wrap=True)
    console.print(_summary(outcomes))
    caught = sum(done.caught for done in outcomes)
    versions = f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}"
    minutes = (time.monotonic() - begun) / 60
    console.print(f"{caught} of {len(outcomes)} are caught; {versions}; {minutes:.1f} min")
    return 0 if caught == len(outcomes) else 1


def _outcome(project: Path, fault: Fault, source: str) -> _Outcome:
    path = project / fault.file
    original = path.read_text()
    path.write_text(source)
    begun = time.monotonic()
    try:
        status, output = run_tests(project, [fault.test])
    finally:
        path.write_text(original)
    lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    said = lines[0].partition(" - ")[2] if lines else f"pytest ended with {status}"
    return _Outcome(fault, status, said, time.monotonic() - begun)


def _summary(outcomes: Sequence[_Outcome]) -> Table:
    table = Table("package", "planted", "caught", "seconds")
    packages: dict[str, list[_Outcome]] = {}
    for done in outcomes:
        packages.setdefault(str(Path(done.fault.file).parent), []).append(done)
    for package, found in sorted(packages.items()):
        caught, seconds = sum(d.caught for d in found), sum(d.seconds for d in found)
        table.add_row(package, str(len(found)), str(caught), f"{seconds:.0f}")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("words", nargs="*", help="of the file or the description of a fault")
    parser.add_argument("-n", "--workers", type=int, default=1, help="how many run at a time")
    arguments = parser.parse_args()
    sys.exit(main(arguments.words, arguments.workers))

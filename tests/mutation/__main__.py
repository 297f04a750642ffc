"""Plants every fault and tells which of them the tests notice; exit status 1 if not all."""

from __future__ import annotations

import argparse
import os
import queue
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from tests.mutation._fault import Fault
from tests.mutation._project import ROOT, VERSIONS, copy_project, digest, run_tests
from tests.mutation._record import Outcome, Record, summary
from tests.mutation.faults import FAULTS

_RECORD = ROOT / ".cache" / "mutants.jsonl"


def main(words: Sequence[str], workers: int, sample: int, limit: float, again: bool) -> int:
    """Runs the faults whose file or description has one of ``words``; all without any."""
    console = Console(highlight=False)
    begun = time.monotonic()
    chosen = [f for f in FAULTS if not words or any(w in f"{f.file} {f.what}" for w in words)]
    if sample:
        chosen = random.sample(chosen, min(sample, len(chosen)))
    # All of them are read before the first is planted.
    sources = {fault: fault.planted((ROOT / fault.file).read_text()) for fault in chosen}
    if again:
        _RECORD.unlink(missing_ok=True)
    record = Record(_RECORD, digest())
    missing = [f for f in chosen if not ((known := record[f]) and known.caught)]
    if len(missing) < len(chosen):
        console.print(f"{len(chosen) - len(missing)} are known to be caught; --again asks again")

    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(workers) as pool:
        free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for worker in range(workers):
            project = Path(directory) / str(worker)
            copy_project(project)
            free.put(project)

        def outcome(tests: Sequence[str], fault: Fault | None = None) -> Outcome:
            project = free.get()
            try:
                return _outcome(project, tests, limit, fault, sources)
            finally:
                free.put(project)

        tests = [test for test in _tests(missing) if record[test] is None]
        console.print(f"{len(tests)} tests, without a fault")
        parts = [part for i in range(4 * workers) if (part := tests[i :: 4 * workers])]
        healthy = {pool.submit(outcome, part): part for part in parts}
        for done in track(as_completed(healthy), total=len(parts), console=console):
            found = done.result()
            if found.status != 0:
                pool.shutdown(cancel_futures=True)
                console.print(f"They do not pass:\n{found.said}", markup=False)
                return 2
            for test in healthy[done]:
                record[test] = found

        console.print(f"{len(missing)} faults, one at a time in {workers} copies of the project")
        running = {pool.submit(outcome, [fault.test], fault): fault for fault in missing}
        for done in track(as_completed(running), total=len(running), console=console):
            fault = running[done]
            record[fault] = found = done.result()
            word = found.word if found.caught else f"[red]{found.word}[/]"
            where = f"{fault.file}: {escape(fault.what)}"
            console.print(f"{word} {found.seconds:5.1f} s  {where}", soft_wrap=True)
            console.print(f"    {escape(found.said)}", soft_wrap=True)

    outcomes = [(fault, found) for fault in chosen if (found := record[fault])]
    console.print(summary(outcomes))
    for fault, found in outcomes:
        if not found.caught:
            console.print(f"[red]{found.word}[/]  {fault.file}: {escape(fault.what)}")
            console.print(f"    {fault.test}", markup=False, soft_wrap=True)
    caught = sum(found.caught for _, found in outcomes)
    minutes = (time.monotonic() - begun) / 60
    console.print(f"{caught} of {len(chosen)} are caught; {VERSIONS}; {minutes:.1f} min")
    return 0 if caught == len(chosen) else 1


def _tests(faults: Sequence[Fault]) -> list[str]:
    return sorted({fault.test for fault in faults})


def _outcome(
    project: Path,
    tests: Sequence[str],
    limit: float,
    fault: Fault | None,
    sources: dict[Fault, str],
) -> Outcome:
    """Of tests in a copy of the project, with a fault or without."""
    begun = time.monotonic()
    if fault is None:
        status, said = run_tests(project, tests, limit * len(tests))
        if status is None:
            said = f"no answer in time from {', '.join(tests)}; --limit sets how long it may take"
        return Outcome(status, "" if status == 0 else said, time.monotonic() - begun)
    path = project / fault.file
    original = path.read_text()
    path.write_text(sources[fault])
    try:
        status, output = run_tests(project, tests, limit)
    finally:
        path.write_text(original)
    lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    said = lines[0].partition(" - ")[2] if lines else f"pytest ended with {status}"
    return Outcome(status, said, time.monotonic() - begun)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("words", nargs="*", help="of the file or the description of a fault")
    parser.add_argument(
        "-n", "--workers", type=int, default=os.cpu_count() or 1, help="how many run at a time"
    )
    parser.add_argument("--sample", type=int, default=0, help="so many of them, drawn at random")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one fault")
    parser.add_argument("--again", action="store_true", help="also what is known to be caught")
    sys.exit(main(**vars(parser.parse_args())))

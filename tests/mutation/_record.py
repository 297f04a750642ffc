"""What became of the faults, kept in a file, so that a run goes on where the last one ended."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from tests.mutation._fault import Fault


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The exit status of pytest, what it said, and the seconds that it took."""

    status: int | None
    said: str
    seconds: float

    @property
    def caught(self) -> bool:
        return self.status == 1  # A test failed; pytest has others for what is no test.

    @property
    def word(self) -> str:
        return "caught" if self.caught else "survived" if self.status == 0 else "no answer"


class Record:
    """Outcomes of one state of the project, in a file to which each is added at once.

    Args:
      file: lines of JSON, of other states too.
      digest: what names the state.
    """

    def __init__(self, file: Path, digest: str) -> None:
        self._file, self._digest = file, digest
        self._known: dict[str, Outcome] = {}
        for line in file.read_text().splitlines() if file.exists() else []:
            entry = json.loads(line)
            state, what = entry.pop("digest"), entry.pop("what")
            if state == digest:
                self._known[what] = Outcome(**entry)

    def __getitem__(self, what: Fault | str) -> Outcome | None:
        """Of a fault, or of the tests without a fault."""
        return self._known.get(_name(what))

    def __setitem__(self, what: Fault | str, outcome: Outcome) -> None:
        self._known[_name(what)] = outcome
        self._file.parent.mkdir(exist_ok=True)
        entry = {"digest": self._digest, "what": _name(what), **dataclasses.asdict(outcome)}
        with self._file.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _name(what: Fault | str) -> str:
    return what if isinstance(what, str) else f"{what.file}: {what.what}"


def summary(outcomes: Sequence[tuple[Fault, Outcome]]) -> Table:
    """How many faults of each package were caught."""
    table = Table("package", "planted", "caught", "seconds")
    packages: dict[str, list[Outcome]] = {}
    for fault, outcome in outcomes:
        packages.setdefault(str(Path(fault.file).parent), []).append(outcome)
    for package, found in sorted(packages.items()):
        caught, seconds = sum(o.caught for o in found), sum(o.seconds for o in found)
        table.add_row(package, str(len(found)), str(caught), f"{seconds:.0f}")
    return table

"""The report of a comparison: what is asked of it, and how the terminal shows it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nnx_bridge.equivalence._parting import Parting
from nnx_bridge.equivalence._verdict import TOLERANCE, Row, Verdict

# Rows that do not agree which the terminal shows.
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Report:
    """What a comparison found. `rich.print(report)` shows it as a table.

    Attributes:
      name: The name of the case.
      rows: One for each array of each program; of several seeds, the worst.
      seeds: The seeds of the comparison.
      versions: The versions of the packages that computed it.
      skipped: What the reference itself cannot do, and why.
      parting: The first place at which a model parts from its reference; None where it does not.
      reference: What the reference is, where it is not the module of the case.

    Example:
        >>> import numpy as np
        >>> from nnx_bridge.equivalence._verdict import compare_arrays
        >>> rows = compare_arrays("output", "mine", {"y": np.ones(3)}, {"y": np.zeros(3)})
        >>> report = Report("model", tuple(rows), seeds=(0,), versions={})
        >>> report.agrees
        False
        >>> report.assert_equal()
        Traceback (most recent call last):
        AssertionError: model does not agree:
          output, mine, y: differs by 1 in float64[3], which must be equal
    """

    name: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    versions: Mapping[str, str]
    skipped: tuple[str, ...] = ()
    parting: Parting | None = None
    reference: str = ""

    @property
    def agrees(self) -> bool:
        """Whether every array agrees, and there was something to compare."""
        return bool(self.rows) and all(row.verdict.agrees for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that do not agree."""
        return tuple(row for row in self.rows if not row.verdict.agrees)

    def assert_equal(self) -> None:
        """Raises AssertionError with the rows that do not agree, if there are any."""
        if not self.agrees:
            lines = [f"{r.what}, {r.route}, {r.path}: {finding(r)}" for r in self.failures]
            if self.parting is not None:
                lines = [f"first: {self.parting}", *lines[:_SHOWN]]
            raise AssertionError("\n  ".join([f"{self.name} does not agree:", *lines]))

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON data; errors that are no finite number are `null`."""
        rows = [{key: _json_value(value) for key, value in vars(row).items()} for row in self.rows]
        return {
            "name": self.name,
            "agrees": self.agrees,
            "seeds": list(self.seeds),
            "tolerance": TOLERANCE,
            "versions": dict(self.versions),
            "skipped": list(self.skipped),
            "first": None if self.parting is None else vars(self.parting),
            "rows": rows,
        }

    def to_html(self) -> str:
        """The report as one page that needs nothing else: summary, plots, and every array."""
        # Drawing takes longer to import than most of what needs no page.
        from nnx_bridge.equivalence._html import page

        return page(self)

    def save(self, file: Path | str) -> None:
        """Writes the page of `to_html`, or, to a name that ends in `.json`, the data."""
        path = Path(file)
        data = json.dumps(self.to_json(), indent=2) + "\n" if path.suffix == ".json" else ""
        path.write_text(data or self.to_html(), encoding="utf-8")

    def __rich__(self) -> RenderableType:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        routes = list(dict.fromkeys(row.route for row in self.rows))
        seeds = ", ".join(map(str, self.seeds))
        unit = (
            "eps * max|reference| of an array" if self.reference else "the noise of the reference"
        )
        table = Table(
            title=f"{self.name}: compared with {self.reference or 'its reference'}",
            caption=f"1 rounding is {unit}; seed {seeds}; {versions}",
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("compared", no_wrap=True)
        table.add_column("arrays", justify="right")
        for route in routes:
            table.add_column(route)
        for what in dict.fromkeys(row.what for row in self.rows):
            groups = [[r for r in self.rows if (r.what, r.route) == (what, q)] for q in routes]
            table.add_row(what, str(max(map(len, groups))), *map(_summary, groups))
        return Group(table, *_details(self), _conclusion(self))


def _summary(rows: list[Row]) -> Text:
    """All arrays of one kind and one program in a few words."""
    if not rows:
        return Text("-", style="dim")
    bad = [row for row in rows if not row.verdict.agrees]
    worst = max((row.max_roundings for row in rows), key=lambda x: (not math.isnan(x), x))
    if any(row.verdict is Verdict.RAISED for row in bad):
        return Text(Verdict.RAISED.value, style="bold red")
    if bad:
        by = "" if math.isnan(worst) else f", by {_roundings(worst)}"
        return Text(f"{len(bad)} of {len(rows)} disagree{by}", style="bold red")
    if worst > 0:
        return Text(f"equal up to {_roundings(worst)}", style="yellow")
    return Text("equal", style="green")


def _details(report: Report) -> list[Text]:
    """What cannot be read off the table."""
    lines = [Text(f"  skipped: {reason}", style="yellow") for reason in report.skipped]
    if report.parting is not None:
        lines.append(Text(f"  first: {report.parting}", style="bold red"))
    errors = [row for row in report.failures if row.verdict is Verdict.RAISED]
    for route, error in dict.fromkeys((row.route, row.error) for row in errors):
        lines.append(Text(f"  {route} raised {error}", style="red"))
    others = [row for row in report.failures if row.verdict is not Verdict.RAISED]
    for row in others[:_SHOWN]:
        lines.append(Text(f"  {row.what}, {row.route}, {row.path}: {finding(row)}", style="red"))
    if len(others) > _SHOWN:
        lines.append(Text(f"  ... and {len(others) - _SHOWN} more; JSON has all", style="red"))
    return lines


def _conclusion(report: Report) -> Text:
    arrays = len(report.rows)
    if not report.rows:
        return Text(f"{report.name}: nothing was compared", style="bold red")
    if not report.agrees:
        parts = f"{len(report.failures)} of {arrays} comparisons failed"
        return Text(f"{report.name}: {parts}", style="bold red")
    exact = sum(row.verdict is Verdict.EQUAL for row in report.rows)
    how = "to the bit" if exact == arrays else f"{exact} to the bit, the rest up to rounding"
    return Text(f"{report.name}: all {arrays} comparisons agree, {how}", style="bold green")


def finding(row: Row) -> str:
    """What is wrong with a row, in a few words."""
    if row.verdict is not Verdict.DIFFERS:
        return f"{row.verdict.value}: {row.error}" if row.error else row.verdict.value
    where = f"{row.dtype}{list(row.shape)}"
    if math.isinf(row.max_roundings):
        return f"differs by {row.max_error:.3g} in {where}, which must be equal"
    if not math.isnan(row.noise):
        return (
            f"differs by {row.max_error:.3g} in {where}: {row.max_roundings:.2g} times the noise "
            f"of the reference; at most {TOLERANCE:g} are allowed"
        )
    return (
        f"differs by {row.max_error:.3g}, {_roundings(row.max_roundings)} of {where}; at most "
        f"{2 * TOLERANCE:g} are allowed"
    )


def _roundings(number: float) -> str:
    return "any number of roundings" if math.isinf(number) else f"{number:.2g} roundings"


def _json_value(value: Any) -> Any:
    if isinstance(value, Verdict):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, tuple):
        return [_json_value(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {key: _json_value(item) for key, item in vars(value).items()}
    return json.loads(json.dumps(value))

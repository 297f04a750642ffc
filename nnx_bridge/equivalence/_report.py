"""What a comparison found: rows, one for each array and route, and the verdict over all.

The programs that are compared hold the same equations, so their results are expected to be equal to
the bit. XLA may still fuse or order the equations of two programs differently, and then a result
moves by a few roundings of the largest value in its array: `eps * max|reference|`. That is the unit
errors are stated in, for the dtype of the array, and `TOLERANCE` of them still count as equal. Real
faults are larger by orders of magnitude. Integers, booleans and keys must be equal.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

TOLERANCE = 16.0

# Rows that do not agree which the terminal shows.
_SHOWN = 20


class Verdict(enum.Enum):
    """How an array compares with its reference."""

    EQUAL = "equal"
    ROUNDING = "equal up to rounding"
    DIFFERS = "differs"
    NAN = "not a number"
    MISSING = "missing"
    UNEXPECTED = "unexpected"
    MISMATCH = "other shape or dtype"
    RAISED = "raised an error"

    @property
    def agrees(self) -> bool:
        """Whether the arrays count as equal."""
        return self in (Verdict.EQUAL, Verdict.ROUNDING)


@dataclasses.dataclass(frozen=True)
class Row:
    """One array of one program beside the same array of raw JAX; or why there is none.

    Attributes:
      what: What the array is, such as "parameter gradient".
      route: The program that computed it.
      path: Its path, such as `params/Dense_0/kernel`.
      shape: Its shape.
      dtype: Its dtype.
      max_error: The largest absolute difference; NaN where there is nothing to subtract.
      max_roundings: The same in roundings; infinite for any difference of integers.
      verdict: Whether it counts as equal, and if not, why.
      error: What was raised, or other details of the verdict.
    """

    what: str
    route: str
    path: str
    shape: tuple[int, ...]
    dtype: str
    max_error: float
    max_roundings: float
    verdict: Verdict
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a check found. `rich.print(report)` shows it as a table.

    Attributes:
      name: The name of the case.
      rows: One for each array of each program.
      seed: The seed of the check.
      versions: The versions of the packages that computed it.
      skipped: What raw JAX itself cannot do with the module, and why.

    Example:
        >>> rows = compare_arrays("output", "mine", {"y": np.ones(3)}, {"y": np.zeros(3)})
        >>> report = Report("model", tuple(rows), seed=0, versions={})
        >>> report.agrees
        False
        >>> report.assert_equal()
        Traceback (most recent call last):
        AssertionError: model does not agree:
          output, mine, y: differs by 1 in float64[3], which must be equal
    """

    name: str
    rows: tuple[Row, ...]
    seed: int
    versions: Mapping[str, str]
    skipped: tuple[str, ...] = ()

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
            lines = (f"{r.what}, {r.route}, {r.path}: {_finding(r)}" for r in self.failures)
            raise AssertionError("\n  ".join([f"{self.name} does not agree:", *lines]))

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON data; errors that are no finite number are `null`."""
        rows = [{key: _json_value(value) for key, value in vars(row).items()} for row in self.rows]
        return {
            "name": self.name,
            "agrees": self.agrees,
            "seed": self.seed,
            "tolerance_in_roundings": TOLERANCE,
            "versions": dict(self.versions),
            "skipped": list(self.skipped),
            "rows": rows,
        }

    def __rich__(self) -> RenderableType:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        routes = list(dict.fromkeys(row.route for row in self.rows))
        table = Table(
            title=f"{self.name}: compared with raw JAX over module.apply",
            caption=f"1 rounding is eps * max|reference| of an array; seed {self.seed}; {versions}",
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


def raised(what: str, route: str, error: Exception) -> Row:
    """The row of a program that raised where raw JAX did not."""
    message = f"{type(error).__name__}: {error}"
    return Row(what, route, "-", (), "-", math.nan, math.nan, Verdict.RAISED, message)


def compare_arrays(
    what: str, route: str, actual: Mapping[str, Any], reference: Mapping[str, Any]
) -> Iterator[Row]:
    """A row for each array that either side has.

    Args:
      what: What the arrays are, such as "output".
      route: Which program computed `actual`.
      actual: Arrays by path.
      reference: The arrays that they should equal.
    """
    for path in dict.fromkeys([*reference, *actual]):
        found, expected = actual.get(path), reference.get(path)
        error, roundings, verdict = _compare(found, expected)
        note = _not_a_number(found, expected) if verdict is Verdict.NAN else ""
        shown: Any = found if expected is None else expected
        shape, dtype = np.shape(shown), str(shown.dtype)
        yield Row(what, route, path, shape, dtype, error, roundings, verdict, note)


def _compare(actual: Any, reference: Any) -> tuple[float, float, Verdict]:
    if actual is None or reference is None:
        return math.nan, math.nan, Verdict.MISSING if actual is None else Verdict.UNEXPECTED
    if actual.shape != reference.shape or actual.dtype != reference.dtype:
        return math.nan, math.nan, Verdict.MISMATCH
    inexact = jnp.issubdtype(reference.dtype, jnp.inexact)
    eps = float(jnp.finfo(reference.dtype).eps) if inexact else 0.0
    actual, reference = _wide(actual), _wide(reference)
    if inexact and (np.isnan(actual).any() or np.isnan(reference).any()):
        return math.nan, math.nan, Verdict.NAN
    same = actual == reference
    if same.all():
        return 0.0, 0.0, Verdict.EQUAL
    with np.errstate(invalid="ignore"):
        error = float(np.abs(actual - reference)[~same].max())
    unit = eps * float(np.abs(reference).max())
    roundings = error / unit if unit > 0 else math.inf
    return error, roundings, Verdict.ROUNDING if roundings <= TOLERANCE else Verdict.DIFFERS


def _not_a_number(actual: Any, reference: Any) -> str:
    here, there = (int(np.isnan(_wide(array)).sum()) for array in (actual, reference))
    return f"{here} of {actual.size} values, and {there} in raw JAX"


def _wide(array: Any) -> np.ndarray[Any, Any]:
    """The values in a type that holds those of every narrower one."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    values = np.asarray(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return values.astype(np.complex128)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return values.astype(np.float64)
    # Differences of Python integers neither wrap around nor lose digits.
    return values.astype(object)


def _summary(rows: list[Row]) -> Text:
    """All arrays of one kind and one program in a few words."""
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
    errors = [row for row in report.failures if row.verdict is Verdict.RAISED]
    for route, error in dict.fromkeys((row.route, row.error) for row in errors):
        lines.append(Text(f"  {route} raised {error}", style="red"))
    others = [row for row in report.failures if row.verdict is not Verdict.RAISED]
    for row in others[:_SHOWN]:
        lines.append(Text(f"  {row.what}, {row.route}, {row.path}: {_finding(row)}", style="red"))
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


def _finding(row: Row) -> str:
    if row.verdict is not Verdict.DIFFERS:
        return f"{row.verdict.value}: {row.error}" if row.error else row.verdict.value
    where = f"{row.dtype}{list(row.shape)}"
    if math.isinf(row.max_roundings):
        return f"differs by {row.max_error:.3g} in {where}, which must be equal"
    return (
        f"differs by {row.max_error:.3g}, {_roundings(row.max_roundings)} of {where}; at most "
        f"{TOLERANCE:g} are allowed"
    )


def _roundings(number: float) -> str:
    return "any number of roundings" if math.isinf(number) else f"{number:.2g} roundings"


def _json_value(value: Any) -> Any:
    if isinstance(value, Verdict):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return json.loads(json.dumps(value))

"""Plans as tables in the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lifted._errors import path_text
from nnx_bridge._collections import Path
from nnx_bridge.weights._paths import tokens
from nnx_bridge.weights._row import Certainty, Row

if TYPE_CHECKING:
    from nnx_bridge.weights._plan import Plan

# Problems that the terminal shows in full.
_SHOWN = 20
# Names in braces.
_BRACED = 4

_STYLES = {Certainty.NUMBERS: "yellow", Certainty.ONLY: "yellow"}


def table(plan: Plan) -> RenderableType:
    """The rows of a plan, and what is wrong with it."""
    shapes = {leaf.path: str(leaf) for leaf in plan.linen}
    groups = _groups(plan.rows, shapes)
    rows = Table(box=box.SIMPLE_HEAD, title="Linen to NNX", title_justify="left")
    for name in ("Linen", "NNX", "array", "layout", "certainty"):
        rows.add_column(name, overflow="fold")
    for group in groups:
        row = group[0]
        array = shapes.get(row.linen[0], "") if row.linen else ""
        certainty = f"{row.certainty.value}{f' ({row.why})' if row.why else ''}"
        rows.add_row(
            Text(_side([path for row in group for path in row.linen])),
            Text(_side([path for row in group for path in row.nnx]) or "(nothing)"),
            Text(array + (f" × {len(row.linen)}" if len(row.linen) > 1 else "")),
            str(row.layout),
            certainty,
            style=_STYLES.get(row.certainty),
        )
    return Group(rows, _conclusion(plan))


def _groups(rows: Sequence[Row], shapes: Mapping[Path, str]) -> list[list[Row]]:
    """Rows that differ in one number of each side only, and in the same order, together."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        sides = [[tokens(path) for path in paths] for paths in (row.linen, row.nnx)]
        name = [[[(t.name, len(t.numbers)) for t in path] for path in side] for side in sides]
        array = shapes.get(row.linen[0]) if row.linen else None
        key = (
            repr(name),
            array,
            row.layout,
            row.certainty,
        )
        groups.setdefault(key, []).append(row)
    return [part for group in groups.values() for part in _checked(group)]


def _checked(group: list[Row]) -> list[list[Row]]:
    """The group, if its numbers grow on both sides together; otherwise each row alone."""
    alone = [[row] for row in group]
    numbers = []
    for paths in ([row.linen for row in group], [row.nnx for row in group]):
        places = [[n for path in p for t in tokens(path) for n in t.numbers] for p in paths]
        changing = {tuple(column) for column in zip(*places, strict=True) if len(set(column)) > 1}
        if len(changing) != 1:
            return alone
        numbers.append(changing.pop())
    order = sorted(range(len(group)), key=lambda i: numbers[0][i])
    theirs = [numbers[1][i] for i in order]
    if len(group) < 2 or theirs != sorted(set(theirs)):
        return alone
    return [[group[i] for i in order]]


def _side(paths: Sequence[Path]) -> str:
    """Paths in one line: what they have in common, and in braces what they have not."""
    if len({len(path) for path in paths}) != 1:
        return ", ".join(map(path_text, paths))
    columns = [list(dict.fromkeys(map(str, column))) for column in zip(*paths, strict=True)]
    return "/".join(c[0] if len(c) == 1 else f"{{{_short(c)}}}" for c in columns)


def _short(texts: list[str]) -> str:
    return ",".join(texts if len(texts) <= _BRACED else [texts[0], "...", texts[-1]])


def _conclusion(plan: Plan) -> Text:
    counts = Counter(row.certainty.value for row in plan.rows)
    found = ", ".join(f"{count} by {certainty}" for certainty, count in counts.items())
    summary = f"{len(plan.linen)} arrays of Linen, {len(plan.nnx)} of NNX; {len(plan.rows)} rows"
    text = Text(f"{summary}: {found}\n" if found else f"{summary}\n")
    if not plan.problems:
        return text.append("complete\n", style="green")
    text.append(f"{len(plan.problems)} problem(s)\n", style="bold red")
    for problem in plan.problems[:_SHOWN]:
        text.append(f"{problem.kind.value}: ", style="red").append(f"{problem.text}\n")
    if len(plan.problems) > _SHOWN:
        text.append(f"... and {len(plan.problems) - _SHOWN} more\n")
    return text

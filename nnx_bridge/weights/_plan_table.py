"""Plans as tables in the terminal."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lifted._errors import path_text
from nnx_bridge._collections import Path
from nnx_bridge.weights._row import Certainty

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
    rows = Table(box=box.SIMPLE_HEAD, title="Linen to NNX", title_justify="left")
    for name in ("Linen", "NNX", "array", "layout", "certainty"):
        rows.add_column(name, overflow="fold")
    for row in plan.rows:
        array = shapes.get(row.linen[0], "") if row.linen else ""
        certainty = f"{row.certainty.value}{f' ({row.why})' if row.why else ''}"
        rows.add_row(
            Text(_side(row.linen)),
            Text(_side(row.nnx) or "(nothing)"),
            Text(array + (f" × {len(row.linen)}" if len(row.linen) > 1 else "")),
            row.layout_text,
            certainty,
            style=_STYLES.get(row.certainty),
        )
    return Group(rows, _conclusion(plan))


def _side(paths: tuple[Path, ...]) -> str:
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

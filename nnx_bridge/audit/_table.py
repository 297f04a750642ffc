"""An audit for the terminal: the summary first, then what is used, then where to begin."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nnx_bridge.audit._findings import ROUTES, Audit, Finding
from nnx_bridge.compat._difference import Route

_STYLES: dict[Route, str] = {
    "native": "green",
    "compat": "cyan",
    "by hand": "yellow",
    "host only": "red",
}
_MEANINGS: dict[Route, str] = {
    "native": "NNX has the same, or a plain counterpart",
    "compat": "ours has Linen's semantics, in nnx_bridge or lifted",
    "by hand": "another program, which somebody has to write",
    "host only": "runs as it is in nnx_bridge.Host, until the module around it is rewritten",
}
# Classes, places and problems beyond these are in the JSON.
_SHOWN = 40
_PLACES = 3


def table(audit: Audit) -> RenderableType:
    """The whole audit."""
    parts: list[RenderableType] = [_summary(audit), _uses(audit.findings)]
    if audit.classes:
        parts.append(_classes(audit))
    parts += [Text(f"not read: {problem}", "red") for problem in audit.problems[:_SHOWN]]
    return Group(*parts)


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")


def _summary(audit: Audit) -> Table:
    files = f" in {audit.files} files" if audit.files > 1 else ""
    shown = _table(f"{audit.target}: {len(audit.findings)} uses of Linen{files}")
    shown.add_column("route", no_wrap=True)
    shown.add_column("uses", justify="right")
    shown.add_column("classes", justify="right")
    shown.add_column("")
    for route in ROUTES:
        shown.add_row(
            Text(route, _STYLES[route]),
            str(audit.counts[route]),
            str(audit.class_counts[route]),
            _MEANINGS[route],
        )
    return shown


def _uses(findings: Iterable[Finding]) -> Table:
    """Equal uses in one row, those of most work first."""
    shown = _table("What is used")
    shown.add_column("what", no_wrap=True)
    shown.add_column("uses", justify="right")
    shown.add_column("route", no_wrap=True)
    shown.add_column("what to use instead, why, and where", overflow="fold")

    def key(finding: Finding) -> tuple[int, str, str, str, str]:
        order = -ROUTES.index(finding.route)
        return order, finding.kind, finding.name, finding.use, finding.reason

    for _, group in groupby(sorted(findings, key=key), key):
        same = list(group)
        first, places = same[0], list(dict.fromkeys(f.where for f in same if f.where))
        text = Text()
        text.append("" if first.use == "-" else f"{first.use}\n", "bold")
        text.append(first.reason)
        if places:
            more = ", …" if len(places) > _PLACES else ""
            text.append(f"\n{', '.join(places[:_PLACES])}{more}", "dim")
        kind = "" if first.kind in ("layer", "api", "transform") else f" ({first.kind})"
        shown.add_row(
            f"{first.name}{kind}",
            str(len(same)),
            Text(first.route, _STYLES[first.route]),
            text,
        )
    return shown


def _classes(audit: Audit) -> Table:
    """The classes in an order in which each comes after those that it uses."""
    shown = _table("Module classes, in an order to rewrite them")
    shown.add_column("class", overflow="fold")
    shown.add_column("route", no_wrap=True)
    shown.add_column("after", overflow="fold")
    shown.add_column("where", overflow="fold")
    for cls in audit.classes[:_SHOWN]:
        route = audit.route_of(cls.name)
        shown.add_row(cls.name, Text(route, _STYLES[route]), ", ".join(cls.uses), cls.where)
    if len(audit.classes) > _SHOWN:
        shown.caption = f"… and {len(audit.classes) - _SHOWN} more, see --json"
    return shown

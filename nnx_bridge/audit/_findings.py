"""What an audit found: one finding for each use of Linen, and the classes that they are in."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import flax

from nnx_bridge.compat import Difference, difference
from nnx_bridge.compat._difference import Route

Kind: TypeAlias = Literal[
    "layer", "transform", "api", "parameter", "collection", "rng stream", "sow", "perturb"
]

ROUTES: tuple[Route, ...] = ("native", "compat", "by hand", "host only")
"""From the least to the most work."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One use of Linen.

    Attributes:
      kind: What it is.
      name: What it is called: a name of `flax.linen`, a collection, an RNG stream, what is sown.
      module: The class of the user in which it is.
      where: The path of the layer in the model, or `file:line`.
      route: What it becomes; see `nnx_bridge.compat.Difference`.
      use: The name to use instead.
      reason: Why, in one sentence.
      settings: What it was given and is not the default, as text.
    """

    kind: Kind
    name: str
    module: str
    where: str
    route: Route
    use: str
    reason: str
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)


@dataclasses.dataclass(frozen=True)
class ModuleClass:
    """One class of the user that derives from `flax.linen.Module`.

    Attributes:
      name: Its name.
      where: `file:line` of its definition.
      uses: The other classes of the user that it names: they come before it.
    """

    name: str
    where: str
    uses: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Audit:
    """What moving a model, or a package of models, to NNX takes. `rich.print(audit)` shows it.

    Attributes:
      target: What was looked at.
      findings: Every use of Linen, in the order of the source or of the call.
      classes: The classes of the user that are Linen modules, those first that need no others.
      problems: What could not be looked at, and why.
      files: How many files were read.
    """

    target: str
    findings: tuple[Finding, ...]
    classes: tuple[ModuleClass, ...]
    problems: tuple[str, ...] = ()
    files: int = 0

    @property
    def counts(self) -> dict[Route, int]:
        """How many findings take each route."""
        found = Counter(finding.route for finding in self.findings)
        return {route: found[route] for route in ROUTES}

    def route_of(self, name: str) -> Route:
        """What a class takes: the route of most work among its findings.

        Example:
            >>> finding = Finding("layer", "GRUCell", "Model", "", "compat", "", "")
            >>> Audit("model", (finding,), (ModuleClass("Model", ""),)).route_of("Model")
            'compat'
        """
        found = [finding.route for finding in self.findings if finding.module == name]
        return max(found, key=ROUTES.index, default="native")

    @property
    def class_counts(self) -> dict[Route, int]:
        """How many classes take each route."""
        found = Counter(self.route_of(cls.name) for cls in self.classes)
        return {route: found[route] for route in ROUTES}

    def to_json(self) -> dict[str, Any]:
        """The audit as plain JSON data."""
        return {
            "target": self.target,
            "flax": flax.__version__,
            "files": self.files,
            "findings_by_route": dict(self.counts),
            "classes_by_route": dict(self.class_counts),
            "classes": [
                {**dataclasses.asdict(cls), "route": self.route_of(cls.name)}
                for cls in self.classes
            ],
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "problems": list(self.problems),
        }

    def __rich__(self) -> Any:
        from nnx_bridge.audit._table import table

        return table(self)


def ordered(classes: Mapping[str, ModuleClass]) -> tuple[ModuleClass, ...]:
    """The classes, those that a class uses before it; of a circle, the first that is named."""
    done: dict[str, ModuleClass] = {}
    begun: set[str] = set()

    def visit(name: str) -> None:
        if name in begun:
            return
        begun.add(name)
        for used in classes[name].uses:
            visit(used)
        done[name] = classes[name]

    for name in classes:
        visit(name)
    return tuple(done.values())


def use_of(row: Difference, route: Route) -> str:
    """The name to use in place of a name of Linen."""
    if route == "compat" and row.compat is not None:
        return row.compat
    if route == "host only":
        return "nnx_bridge.Host"
    return f"nnx.{row.nnx}" if row.nnx else "-"


def of_linen(
    name: str,
    *,
    module: str,
    where: str,
    fields: Mapping[str, Any] | None = None,
    unknown: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
) -> Finding:
    """The finding for a use of a name in the table of differences.

    Args:
      name: The name in `flax.linen`, with a row of its own.
      module: The class that it is used in.
      where: Where it is.
      fields: Values of its fields, as far as they are known.
      unknown: The other fields that are given, with their source.
      settings: What is given, as text.
    """
    row = difference(name)
    known = dict(fields or {})
    matters = row.matters(known)
    maybe = tuple(field for field in unknown or {} if field in row.equal_where)
    route: Route = row.route
    reason = row.what
    if row.equal_where and not matters:
        if maybe:
            given = ", ".join(f"{field}={(unknown or {})[field]}" for field in maybe)
            reason = f"depends on {given}: {row.what}"
        else:
            route, reason = "native", "equal at these settings"
    kind: Kind = "layer" if row.kind == "layer" else "transform"
    if row.kind == "api":
        kind = "api"
    return Finding(
        kind, name, module, where, route, use_of(row, route), reason, dict(settings or {})
    )

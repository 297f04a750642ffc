"""The first place at which two models part.

A fault in one layer shows in every layer behind it. So the calls of the reference are gone through
in the order in which they ended, inner ones before outer ones: the first whose output differs
although its inputs agree is where the fault is. In the backward pass it is the module whose output
gradient agrees, but not the gradient of its inputs or of its parameters.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from nnx_bridge.equivalence._calls import Call
from nnx_bridge.equivalence._correspondence import Correspondence, normal
from nnx_bridge.equivalence._verdict import Row, Verdict

VALUE = "variable"


@dataclasses.dataclass(frozen=True)
class Parting:
    """Where two models part first.

    Attributes:
      path: The module, or the variable, by its path in the reference; empty for the model itself.
      kind: "module" or "variable", or what else is compared, such as "output, step 2".
      module: The class of the module in the reference; empty where it is none.
      route: In which of the comparisons.
      reason: Why it is there.
    """

    path: str
    kind: str
    module: str
    route: str
    reason: str

    def __str__(self) -> str:
        named = self.path or "the model itself"
        of = f" ({self.module})" if self.module else ""
        return f"{self.kind} {named}{of}, {self.route}: {self.reason}"


def pairs(
    reference: Mapping[str, Call], model: Mapping[str, Call], correspondence: Correspondence
) -> tuple[dict[str, str], set[str]]:
    """Which call of a model stands for which of the reference.

    Calls are paired by the paths of their modules; then a layer in a list (`layers/1/mlp`) with the
    step of a scanned one (`layers/mlp (step 2)`); the rest by their order between such pairs and by
    the names of their classes.

    Returns:
      Names of the model's calls to those of the reference; and those of the reference that were
      paired by their paths.
    """
    found: dict[str, str] = {}
    for name in model:
        path, end = _split(name)
        partner = f"{correspondence.module(path)}{end}"
        if partner in reference and partner not in found.values():
            found[name] = partner
    certain = set(found.values())
    by_step = {place: name for name in reference if name not in certain for place in _places(name)}
    for name in model:
        partner = next(
            (by_step[p] for p in _places(name) if name not in found and p in by_step), ""
        )
        if partner and partner not in found.values():
            found[name] = partner
    known = set(found.values())
    ours = [name if name in known else call.module for name, call in reference.items()]
    theirs = [found.get(name, call.module) for name, call in model.items()]
    names, partners = list(model), list(reference)
    for a, b, size in difflib.SequenceMatcher(
        None, theirs, ours, autojunk=False
    ).get_matching_blocks():
        for i in range(size):
            found.setdefault(names[a + i], partners[b + i])
    return found, certain


def sown_pairs(
    reference: Iterable[str], model: Iterable[str], correspondence: Correspondence
) -> dict[str, str]:
    """Names of what a model sows to those of what the reference sows, by path and name."""
    found = {}
    known = set(reference)
    for sown in model:
        path, end = _split(sown)
        module, _, name = path.rpartition("/")
        partner = f"{correspondence.module(module)}/{name}{end}".lstrip("/")
        if partner in known:
            found[sown] = partner
    return found


def find(
    rows: Sequence[Row], calls: Mapping[str, Call], paired: Iterable[str], route: str
) -> Parting | None:
    """The first place at which a model parts from the reference; None where it does not.

    Args:
      rows: The rows of one comparison, also those that are not reported.
      calls: The calls of the reference in the order in which they ended.
      paired: Those that have a partner.
      route: The name of the comparison.
    """
    bad = [row for row in rows if not row.verdict.agrees]
    if not bad:
        return None
    for row in bad:
        if row.what == VALUE:
            return Parting(row.path, "variable", "", route, row.error or row.verdict.value)
        if row.verdict is Verdict.RAISED and row.what == "call":
            module = calls[row.path].module if row.path in calls else ""
            return Parting(row.path, "module", module, route, row.error)
    by_call = _by_call(rows)
    # Of calls in a branch that was not taken there are no rows.
    wanted = {name for _, name in by_call}.intersection(paired)
    names = [name for name in calls if name in wanted]
    for ended, name in enumerate(names, 1):
        if _agree(by_call, "layer input", name) and _agree(by_call, "layer output", name) is False:
            # A fault that is small beside the noise crosses the line some layers later: of those
            # up to here, the place is where the difference grows most.
            name = max(names[:ended], key=lambda n: _growth(by_call, n))
            reason = "its inputs agree, its output does not"
            outputs = by_call[("layer output", name)]
            reason += "".join(
                f" ({row.error})"
                for row in outputs
                if row.verdict in (Verdict.NAN, Verdict.SHAPE, Verdict.DTYPE)
            )
            if _agree(by_call, "layer output", name):
                reason = "its output is the first that is off by more than its inputs"
            reason += f", first in {_step(name)}" if _step(name) else ""
            between = _between(name, names, calls, by_call)
            return Parting(path_of(name), "module", calls[name].module, route, reason + between)
    for row in bad:
        if row.what in ("output", "state"):
            return Parting(row.path, _kind(row), "", route, f"{row.what} {row.verdict.value}")
    for name in names:
        # Modules whose outputs nothing depends on have no gradient there.
        if _agree(by_call, "layer output gradient", name) is False:
            continue
        inputs = _agree(by_call, "layer input gradient", name)
        own = [r for r in bad if r.what == "parameter gradient" and _is_of(r.path, name)]
        if inputs is False or own:
            part = "its inputs" if inputs is False else f"its parameter {own[0].path}"
            reason = f"the gradient of its output agrees, that of {part} does not"
            return Parting(path_of(name), "module", calls[name].module, route, reason)
    hidden = ("layer input", "layer output", "layer input gradient", "layer output gradient")
    row = next((row for row in bad if row.what not in hidden), bad[0])
    reason = f"{row.what} {row.verdict.value}" + (f": {row.error}" if row.error else "")
    return Parting(row.path, _kind(row), "", route, reason)


def _kind(row: Row) -> str:
    variables = ("state", "parameter")
    return "variable" if row.what.startswith(variables) else row.what


def _split(name: str) -> tuple[str, str]:
    """A call's name as the path of the module, and the rest: the method, and which call it is."""
    path, space, count = name.partition(" ")
    head, slash, last = path.rpartition("/")
    last, dot, method = last.partition(".")
    return f"{head}{slash}{last}", f"{dot}{method}{space}{count}"


def path_of(name: str) -> str:
    """The path of the module in the name of a call."""
    return _split(name)[0]


def _step(name: str) -> str:
    """Which step of a loop a call is, such as "step 2"; empty where it is in none."""
    return next((m[1] for m in re.finditer(r" \((steps? [^)]*)\)$", name)), "")


def _places(name: str) -> set[str]:
    """A call in a form in which layers of a list are the steps of one: `layers/mlp` at 1."""
    path, end = _split(name)
    if step := re.fullmatch(r"(.*) \(step (\d+)\)", end):
        return {f"{normal(path)}{step[1]} at {step[2]}"}
    numbers = re.finditer(r"_(\d+)(?=/|$)", normal(path))
    return {
        f"{m.string[: m.start()]}{m.string[m.end() :]}{end} at {int(m[1]) + 1}" for m in numbers
    }


def _is_of(parameter: str, name: str) -> bool:
    """Whether a parameter is one of the module's own, or of a module in it."""
    return f"{parameter.partition('/')[2]}/".startswith(
        f"{path_of(name)}/" if path_of(name) else ""
    )


def _by_call(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.what.startswith("layer"):
            found.setdefault((row.what, row.path.partition(" [")[0]), []).append(row)
    return found


def _agree(by_call: Mapping[tuple[str, str], list[Row]], what: str, name: str) -> bool | None:
    """Whether all arrays of a call agree; true for inputs that it has none of."""
    rows = by_call.get((what, name))
    if rows is None:
        return True if what == "layer input" else None
    return all(row.verdict.agrees for row in rows)


def _growth(by_call: Mapping[tuple[str, str], list[Row]], name: str) -> float:
    """How much further a call's outputs are off than its inputs, in units of the noise."""
    if not _agree(by_call, "layer input", name):
        return 0.0
    inputs = (row.max_roundings for row in by_call.get(("layer input", name), ()))
    outputs = by_call.get(("layer output", name), ())
    before, after = max(inputs, default=0.0), max((r.max_roundings for r in outputs), default=0.0)
    if any(not row.verdict.agrees and math.isnan(row.max_roundings) for row in outputs):
        return math.inf
    return after / max(before, 1.0)


def _between(
    name: str,
    names: Sequence[str],
    calls: Mapping[str, Call],
    by_call: Mapping[tuple[str, str], list[Row]],
) -> str:
    """Which of the modules inside one surround the place."""
    prefix = f"{path_of(name)}/" if path_of(name) else ""
    inner = [n for n in names if n != name and n.startswith(prefix)]
    wrong = [n for n in inner if _agree(by_call, "layer input", n) is False]
    good = [n for n in inner if _agree(by_call, "layer output", n)]
    first = min(wrong, key=lambda n: calls[n].begun, default=None)
    if first is not None:
        ended = set(list(calls)[: calls[first].ended])
        good = [n for n in good if n in ended]
    after = f"; it is after {good[-1]}" if good else ""
    before = f"{' and' if after else '; it is'} before {first}" if first is not None else ""
    return after + before

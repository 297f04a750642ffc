"""A report as one HTML page that needs nothing else: no network, no files beside it."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import jinja2
from matplotlib.figure import Figure

from nnx_bridge.equivalence._report import Report, finding
from nnx_bridge.equivalence._verdict import TOLERANCE, Row

_PARAMETERS = ("variable", "parameter gradient")

_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; --bad: #c0392b; --good: #1e8449; --line: #8884; }
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto;
    padding: 0 1rem }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
  th, td { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid var(--line) }
  td.number { text-align: right } code { font-size: 90% }
  .bad { color: var(--bad); font-weight: 600 } .good { color: var(--good) }
  .first { border-left: 4px solid var(--bad); padding: .3rem 1rem; margin: 1rem 0 }
  img { max-width: 100%; background: white } summary { cursor: pointer; margin: .5rem 0 }
  .note { opacity: .75 }
</style>
</head>
<body>
{% for report in reports %}
<h1>{{ report.name }}:
  {% if report.agrees %}<span class="good">equal</span>{% else %}
  <span class="bad">not equal</span>{% endif %}</h1>
<p class="note">{{ report.note }}</p>
{% if report.parting %}
<p class="first">They part first at the {{ report.parting.kind }}
  <code>{{ report.parting.path or "the model itself" }}</code>
  {% if report.parting.module %}({{ report.parting.module }}){% endif %},
  {{ report.parting.route }}: {{ report.parting.reason }}.</p>
{% endif %}
{% for reason in report.skipped %}<p class="note">Skipped: {{ reason }}</p>{% endfor %}
<h2>Summary</h2>
<table>
<tr><th>compared</th><th>where</th><th>arrays</th><th>disagree</th><th>worst, in noise</th></tr>
{% for group in report.groups %}
<tr><td>{{ group.what }}</td><td>{{ group.route }}</td><td class="number">{{ group.size }}</td>
<td class="number {{ 'bad' if group.bad else 'good' }}">{{ group.bad }}</td>
<td class="number">{{ group.worst }}</td></tr>
{% endfor %}
</table>
{% if report.plot %}
<h2>Layer by layer</h2>
<p class="note">In the order in which the layers end. A value of 1 is the rounding error of the
reference itself; above the line counts as different.</p>
<img alt="Errors by layer" src="data:image/svg+xml;base64,{{ report.plot }}">
{% endif %}
{% for section in report.sections %}
<details {{ "open" if section.open }}><summary><b>{{ section.title }}</b></summary>
<table>
<tr><th>compared</th><th>where</th><th>path</th><th>array</th><th>error</th><th>noise</th>
<th>in noise</th><th>verdict</th></tr>
{% for row in section.rows %}
<tr><td>{{ row.what }}</td><td>{{ row.route }}</td><td><code>{{ row.path }}</code></td>
<td>{{ row.array }}</td><td class="number">{{ row.error }}</td>
<td class="number">{{ row.noise }}</td><td class="number">{{ row.multiple }}</td>
<td class="{{ 'good' if row.agrees else 'bad' }}">{{ row.verdict }}</td></tr>
{% for element in row.worst %}
<tr class="note"><td></td><td></td><td>at {{ element.index }}</td>
<td colspan="5">{{ element.actual }} in the model, {{ element.reference }} in the reference,
{{ element.exact }} in float64</td></tr>
{% endfor %}
{% endfor %}
</table></details>
{% endfor %}
{% endfor %}
</body>
</html>
"""
)


def page(*reports: Report) -> str:
    """The page of one report or several.

    Example:
        >>> page(Report("model", (), (0,), {})).startswith("<!doctype html>")
        True
    """
    title = ", ".join(report.name for report in reports)
    return _PAGE.render(title=title, reports=[_content(report) for report in reports])


def _content(report: Report) -> dict[str, Any]:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    failures = report.failures
    parameters = [row for row in report.rows if row.what in _PARAMETERS]
    sections = [
        {"title": f"What differs ({len(failures)})", "open": True, "rows": _rows(failures, True)},
        {"title": f"Parameters ({len(parameters)})", "open": False, "rows": _rows(parameters)},
        {"title": f"All arrays ({len(report.rows)})", "open": False, "rows": _rows(report.rows)},
    ]
    return {
        "name": report.name,
        "agrees": report.agrees,
        "note": f"Seed {', '.join(map(str, report.seeds))}; {versions}",
        "parting": report.parting,
        "skipped": report.skipped,
        "groups": _groups(report),
        "plot": _plot(report),
        "sections": [section for section in sections if section["rows"]],
    }


def _groups(report: Report) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        groups.setdefault((row.what, row.route), []).append(row)
    return [
        {
            "what": what,
            "route": route,
            "size": len(rows),
            "bad": sum(not row.verdict.agrees for row in rows),
            "worst": _number(max((r.max_roundings for r in rows), key=_order)),
        }
        for (what, route), rows in groups.items()
    ]


def _rows(rows: Any, worst: bool = False) -> list[dict[str, Any]]:
    return [
        {
            "what": row.what,
            "route": row.route,
            "path": row.path,
            "array": f"{row.dtype}{list(row.shape)}",
            "error": _number(row.max_error),
            "noise": _number(row.noise),
            "multiple": _number(row.max_roundings),
            "verdict": row.verdict.value if row.verdict.agrees else finding(row),
            "agrees": row.verdict.agrees,
            "worst": row.worst if worst else (),
        }
        for row in rows
    ]


def _plot(report: Report) -> str:
    """The errors of layers, in SVG; empty where none were recorded."""
    kinds = {"layer output": "o-", "layer output gradient": "s--"}
    rows = [row for row in report.rows if row.what in kinds and math.isfinite(row.max_roundings)]
    if not rows:
        return ""
    names = list(dict.fromkeys(row.path for row in rows if row.what == "layer output"))
    figure = Figure(figsize=(min(4 + 0.4 * len(names), 24), 4), layout="constrained")
    axes = figure.subplots()
    for what, style in kinds.items():
        for route in dict.fromkeys(row.route for row in rows):
            points = [r for r in rows if (r.what, r.route) == (what, route) and r.path in names]
            places = [names.index(row.path) for row in points]
            # On a logarithmic axis what is equal stands at the bottom.
            values = [max(row.max_roundings, 0.01) for row in points]
            axes.plot(places, values, style, label=f"{what}, {route}", markersize=4)
    axes.axhline(TOLERANCE, color="tab:red", linewidth=1)
    axes.set_yscale("log")
    axes.set_ylabel("error / noise")
    axes.set_xticks(range(len(names)), [n or "(model)" for n in names], rotation=60, ha="right")
    axes.legend(fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return base64.b64encode(file.getvalue()).decode()


def _order(number: float) -> tuple[bool, float]:
    return (not math.isnan(number), number)


def _number(number: float) -> str:
    if math.isnan(number):
        return "-"
    return "any" if math.isinf(number) else f"{number:.3g}"

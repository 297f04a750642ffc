"""Plans as JSON: one row a line, so that they can be read, edited and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import linen as nn

from lifted._errors import describe, path_text
from nnx_bridge._collections import Path
from nnx_bridge.weights._layout_json import layout_from_json, layout_to_json
from nnx_bridge.weights._leaves import Leaf, Target
from nnx_bridge.weights._problems import Undecided
from nnx_bridge.weights._row import Certainty, Row

if TYPE_CHECKING:
    from nnx_bridge.weights._plan import Plan

_FORMAT = "flaxlift weights plan 1"


def to_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain data.

    Raises:
      TypeError: A value is kept in a box other than `nn.Partitioned` and `nn.LogicallyPartitioned`.
    """
    return {
        "format": _FORMAT,
        "rows": [_row_to_json(row) for row in plan.rows],
        "linen": [_leaf_to_json(leaf) for leaf in plan.linen],
        "nnx": [_leaf_to_json(leaf) for leaf in plan.nnx],
        "undecided": [
            {"linen": _paths(group.linen), "nnx": _paths(group.nnx), "why": group.why}
            for group in plan.undecided
        ],
        "ignored": _paths(plan.ignored),
        "allow_missing": list(plan.allow_missing),
        "allow_extra": list(plan.allow_extra),
        "cast": list(plan.cast),
    }


def from_json(cls: type[Plan], data: Mapping[str, Any]) -> Plan:
    """The inverse of `to_json`."""
    found = data.get("format") if isinstance(data, Mapping) else describe(data)
    if found != _FORMAT:
        raise ValueError(f"expected a plan of the format {_FORMAT!r}, got {found!r}")
    try:
        return cls(
            tuple(_row(row) for row in data["rows"]),
            tuple(_leaf(leaf, Leaf) for leaf in data["linen"]),
            tuple(_leaf(leaf, Target) for leaf in data["nnx"]),
            tuple(
                Undecided(_tuples(g["linen"]), _tuples(g["nnx"]), g["why"])
                for g in data["undecided"]
            ),
            _tuples(data["ignored"]),
            tuple(data["allow_missing"]),
            tuple(data["allow_extra"]),
            tuple(data["cast"]),
        )
    except KeyError as error:
        raise ValueError(f"the plan has no {error}, which it needs") from error
    except TypeError as error:
        raise ValueError(f"a field of the plan is not what it should be: {error}") from error


def dumps(plan: Plan) -> str:
    """A plan as text, with a line for each row and each array."""
    fields = []
    for name, value in to_json(plan).items():
        lines = ",\n".join(f"    {json.dumps(v)}" for v in value) if isinstance(value, list) else ""
        text = f"[\n{lines}\n  ]" if lines else json.dumps(value)
        fields.append(f'  "{name}": {text}')
    return "{\n" + ",\n".join(fields) + "\n}\n"


def loads(cls: type[Plan], text: str, where: str) -> Plan:
    """The inverse of `dumps`."""
    try:
        return from_json(cls, json.loads(text))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _row_to_json(row: Row) -> dict[str, Any]:
    data: dict[str, Any] = {"linen": _paths(row.linen), "nnx": _paths(row.nnx)}
    data["layout"] = layout_to_json(row.layout)
    return {**data, "certainty": row.certainty.value, "why": row.why}


def _row(data: Mapping[str, Any]) -> Row:
    layout = layout_from_json(data.get("layout", {"kind": "copy"}))
    certainty = Certainty(data.get("certainty", Certainty.RULE.value))
    why = data.get("why", "")
    return Row(_tuples(data["linen"]), _tuples(data["nnx"]), layout, certainty, why)


def _leaf_to_json(leaf: Leaf) -> dict[str, Any]:
    data = {key: value for key, value in vars(leaf).items() if value is not None}
    data["path"] = list(leaf.path)
    if leaf.box is not None:
        data["box"] = _box_to_json(leaf)
    return data


def _leaf(data: Mapping[str, Any], cls: type[Any]) -> Any:
    fields = {"shape": None, **data}
    for key in ("path", "shape", "names", "linen_name"):
        if fields.get(key) is not None:
            fields[key] = _tuple(fields[key])
    if "box" in fields:
        fields["box"] = _box(fields["box"])
    return cls(**fields)


def _box_to_json(leaf: Leaf) -> dict[str, Any]:
    box = jax.tree.unflatten(leaf.box, [0])
    if type(box) is nn.Partitioned and box.mesh is None:
        return {"kind": "Partitioned", "names": box.names}
    if type(box) is nn.LogicallyPartitioned and box.mesh is None:
        return {"kind": "LogicallyPartitioned", "names": box.names, "rules": box.rules}
    raise TypeError(
        f"{path_text(leaf.path)}: a {type(box).__name__} cannot be written as JSON; make the plan "
        "of flax.linen.meta.unbox(variables)"
    )


def _box(data: Mapping[str, Any]) -> Any:
    kinds = {"Partitioned": nn.Partitioned, "LogicallyPartitioned": nn.LogicallyPartitioned}
    fields = {
        key: _tuple(value) for key, value in data.items() if key != "kind" and value is not None
    }
    return jax.tree.structure(kinds[data["kind"]](0, **fields))


def _paths(paths: tuple[Path, ...]) -> list[list[Any]]:
    return [list(path) for path in paths]


def _tuple(value: Any) -> Any:
    """Tuples for lists, all the way down."""
    return tuple(map(_tuple, value)) if isinstance(value, list | tuple) else value


def _tuples(paths: Any) -> tuple[Path, ...]:
    return tuple(_tuple(path) for path in paths)

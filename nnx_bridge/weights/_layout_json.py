"""Layouts as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lifted._errors import suggestion
from nnx_bridge.weights._layouts import (
    CUSTOM,
    Absent,
    Concatenate,
    Copy,
    Custom,
    Layout,
    Reshape,
    Transpose,
)
from nnx_bridge.weights._stacked import Stacked

_KINDS: Mapping[Any, Any] = {
    cls.kind: cls for cls in (Copy, Transpose, Reshape, Concatenate, Absent, Stacked)
}


def layout_to_json(layout: Layout) -> dict[str, Any]:
    """A layout as plain data."""
    if isinstance(layout, Custom):
        return {"kind": layout.kind, "name": layout.name}
    fields = dict(vars(layout))
    if isinstance(layout, Stacked):
        fields["layout"] = layout_to_json(layout.layout)
    return {"kind": layout.kind, **fields}


def layout_from_json(data: Mapping[str, Any]) -> Layout:
    """The inverse of `layout_to_json`.

    Raises:
      ValueError: The kind is unknown, or the name of a `Custom` layout that was not made yet.
    """
    kind = data.get("kind")
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "kind"
    }
    if kind == Custom.kind:
        name = str(data.get("name"))
        if name not in CUSTOM:
            raise ValueError(
                f"the plan uses the layout {name!r}; make it first, with Custom({name!r}, ...); "
                f"{suggestion(name, CUSTOM)}"
            )
        return CUSTOM[name]
    if kind not in _KINDS:
        raise ValueError(f"unknown kind of layout {kind!r}; {suggestion(kind, _KINDS)}")
    if "layout" in fields:
        fields["layout"] = layout_from_json(fields["layout"])
    layout: Layout = _KINDS[kind](**fields)
    return layout

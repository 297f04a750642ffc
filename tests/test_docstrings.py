"""What users import says when to use it, what it takes and returns, and shows an example."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

# The packages of the API reference, `docs/api`.
PACKAGES = (
    "layers",
    "layers.linen",
    "lifted",
    "nnx_bridge",
    "nnx_bridge.audit",
    "nnx_bridge.checkpoints",
    "nnx_bridge.compat",
    "nnx_bridge.equivalence",
    "nnx_bridge.weights",
)


def _public() -> Iterator[Any]:
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            ours = getattr(value, "__module__", "").partition(".")[0]
            if callable(value) and ours in ("layers", "lifted", "nnx_bridge"):
                yield pytest.param(value, id=f"{package}.{name}")


@pytest.mark.parametrize("value", list(_public()))
def test_public_names_are_documented(value: Any) -> None:
    doc = inspect.getdoc(value) or ""
    assert doc == inspect.cleandoc(value.__doc__ or ""), "the docstring of another class"
    if inspect.isfunction(value):
        assert re.search(r"^ *>>> ", doc, re.MULTILINE), "no example"
        signature = inspect.signature(value)
        # Of a family one function says it for all: "Arguments and errors are those of `jacfwd`".
        if not re.search(r"\barguments\b[^.]* are those\s+of `", doc, re.IGNORECASE):
            assert "\nArgs:" in doc or not signature.parameters, "no arguments"
            nothing = signature.return_annotation in (None, "None")
            assert nothing or re.search(r"\n(Returns|Yields):", doc), "no results"

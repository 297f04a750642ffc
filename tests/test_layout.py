"""The packages keep to the layout that the rest relies on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lifted", "nnx_bridge", "layers")


def _imports_at_load(source: Path) -> Iterator[str]:
    """Names of the top-level packages that loading the file imports."""
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("layers", {"lifted", "nnx_bridge"}), ("lifted", {"nnx_bridge", "layers"})],
)
def test_imports_between_the_packages_point_one_way(package: str, forbidden: set[str]) -> None:
    for source in sorted((ROOT / package).rglob("*.py")):
        assert not forbidden & set(_imports_at_load(source)), source

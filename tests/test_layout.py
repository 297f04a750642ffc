"""The packages keep to the layout that the rest relies on."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

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


# What Flax and JAX document, and what users import everywhere. All else of theirs is used in files
# called `*_private.py` alone, where each use has its reason and its test.
DOCUMENTED = {
    "flax.core",
    "flax.core.meta",
    "flax.core.scope",
    "flax.errors",
    "flax.linen",
    "flax.linen.dtypes",
    "flax.linen.initializers",
    "flax.nnx",
    "flax.nnx.bridge",
    "flax.nnx.filterlib",
    "flax.nnx.nn.initializers",  # What `nnx.initializers` is.
    "flax.serialization",
    "flax.traverse_util",
    "flax.typing",
}
SOURCES = [s for package in PACKAGES for s in sorted((ROOT / package).rglob("*.py"))]
PUBLIC_SOURCES = [s for s in SOURCES if not s.name.endswith("_private.py")]
# Attributes that Python makes for named tuples.
OF_PYTHON = {"_replace", "_make", "_fields", "_asdict"}


def _undocumented(code: str) -> list[str]:
    """Undocumented modules of Flax and JAX that are imported, or reached as `nnx.graphlib`."""
    tree, names, found = ast.parse(code), {}, set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name)
                root = alias.name if alias.asname else alias.name.partition(".")[0]
                names[alias.asname or root] = root
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    chains = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for chain in [*names, *chains]:
        first, _, rest = chain.partition(".")
        found.add(".".join([names.get(first, ""), *rest.split(".")]).rstrip("."))
    theirs = {name for name in found if name.partition(".")[0] in ("flax", "jax")}
    return sorted(filter(_is_undocumented, theirs))


def _is_undocumented(name: str) -> bool:
    """Whether a dotted name is that of a module of Flax or JAX that is not documented."""
    if "._" in name.replace(".__", "."):
        return True
    owner, _, last = name.rpartition(".")
    module = sys.modules.get(name) or getattr(sys.modules.get(owner), last, None)
    if not isinstance(module, ModuleType):
        return False
    found = module.__name__
    return found.startswith("jax._") or (found.startswith("flax.") and found not in DOCUMENTED)


def test_undocumented_modules_are_used_in_private_files_alone() -> None:
    used = {str(s.relative_to(ROOT)): _undocumented(s.read_text("utf-8")) for s in PUBLIC_SOURCES}
    assert not {source: names for source, names in used.items() if names}


@pytest.mark.parametrize(
    "code",
    [
        "import flax.nnx.graphlib",
        "from flax.nnx import graphlib",
        "from flax.linen.module import Module",
        "from jax._src import core",
        "from flax import nnx; nnx.graphlib.flatten(x)",
        "import flax; flax.linen.transforms.vmap",
        "import jax as j; j._src.core.Tracer",
    ],
)
def test_undocumented_modules_are_recognised(code: str) -> None:
    assert _undocumented(code)
    assert not _undocumented("import jax, flax; from flax import nnx as n; n.Param.__mro__")


def _own_names() -> set[str]:
    """Names that our packages give to something."""
    names: set[str] = set()
    for node in (node for s in SOURCES for node in ast.walk(ast.parse(s.read_text("utf-8")))):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Store()):
                names.add(node.attr)
            case ast.alias():
                names.add(node.asname or node.name)
    return names


def test_private_attributes_of_others_are_used_in_private_files_alone() -> None:
    own = _own_names() | OF_PYTHON
    foreign = [
        f"{source.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for source in PUBLIC_SOURCES
        for node in ast.walk(ast.parse(source.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr) and node.attr not in own
    ]
    assert not foreign


def test_every_private_file_has_tests() -> None:
    for source in set(SOURCES) - set(PUBLIC_SOURCES):
        tests = ROOT / "tests" / source.parent.relative_to(ROOT) / f"test{source.name}"
        text = tests.read_text(encoding="utf-8")
        functions = [
            node.name
            for node in ast.parse(source.read_text("utf-8")).body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        ]
        untested = [name for name in functions if not re.search(rf"\b{name}\b", text)]
        assert not untested, source

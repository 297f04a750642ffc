"""Every example runs: doctests of the package and the blocks of the guide."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import layers

ROOT = pathlib.Path(layers.__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.iter_modules(layers.__path__))
PUBLIC = {
    name: value
    for name, value in vars(layers).items()
    if not name.startswith("_") and not inspect.ismodule(value)
}


@pytest.mark.parametrize("name", MODULES)
def test_doctests_of_the_package(name):
    results = doctest.testmod(importlib.import_module(f"layers.{name}"))
    assert results.failed == 0


def test_the_guide_runs_from_top_to_bottom():
    text = (ROOT / "docs" / "dropconnect.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) > 5
    exec(compile("\n".join(blocks), "docs/dropconnect.md", "exec"), {})


def test_the_files_that_the_guide_links_to_exist():
    text = (ROOT / "docs" / "dropconnect.md").read_text()
    for target in re.findall(r"(?:\]\(|\]: )(\.\./[^)\s]+)", text):
        assert (ROOT / "docs" / target).exists(), target


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_documented_example(name):
    if name in ("Prediction", "Replacement", "DropConnectSummary"):  # results, shown where made
        assert PUBLIC[name].__doc__
    else:
        assert ">>>" in inspect.getdoc(PUBLIC[name])


def test_the_package_imports_neither_of_its_neighbours():
    program = (
        "import layers, sys; print(*(m for m in ('lifted', 'nnx_bridge') if m in sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []

"""What `inspect` finds in a model that runs, and in source that does not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from rich.console import Console

from nnx_bridge import Case, CaseError
from nnx_bridge.audit import Audit, Finding, inspect
from tests.nnx_bridge.audit import models_of_a_user as models

FILE = Path(models.__file__)


@pytest.fixture(scope="module")
def traced() -> Audit:
    return inspect(models.Model(), jnp.ones((2, 4)), train=True)


@pytest.fixture(scope="module")
def read() -> Audit:
    return inspect(FILE)


def found(audit: Audit, name: str) -> list[Finding]:
    return [finding for finding in audit.findings if finding.name == name]


def line_of(text: str) -> str:
    lines = FILE.read_text().splitlines()
    return f"{FILE}:{next(i for i, line in enumerate(lines, 1) if text in line)}"


# --- A model that runs.


def test_layers_that_run_are_found_with_paths_settings_and_the_class_around_them(
    traced: Audit,
) -> None:
    norms = found(traced, "LayerNorm")
    places = [norm.where.partition("/") for norm in norms]
    assert [place for *_, place in places] == [f"LayerNorm_{i}" for i in range(3)]
    assert len({block for block, *_ in places}) == 1
    assert [norm.route for norm in norms] == ["native", "compat", "native"]
    assert norms[1].settings["dtype"] == "bfloat16"
    assert {norm.module for norm in norms} == {"Block"}


def test_layers_inside_of_a_layer_of_linen_are_its_own(traced: Audit) -> None:
    assert not [f for f in traced.findings if f.kind == "layer" and "query" in f.where]
    (wrapped,) = [f for f in found(traced, "Dense") if f.module == "Model"]
    assert wrapped.where == "Dense_0"


def test_streams_that_the_call_draws_from_are_found_whatever_their_names(traced: Audit) -> None:
    streams = {f.name for f in traced.findings if f.kind == "rng stream"}
    assert streams == {"params", "drop", "noise"}


def test_collections_sown_values_and_perturbations_are_those_of_the_call(traced: Audit) -> None:
    kinds = {(f.kind, f.name, f.use) for f in traced.findings}
    assert ("collection", "counts", "a subclass of nnx.Variable") in kinds
    assert ("collection", "params", "nnx.Param") in kinds
    assert ("sow", "hidden", "nnx.Module.sow") in kinds
    assert ("perturb", "point", "nnx.Module.perturb") in kinds


def test_nothing_is_computed_and_no_memory_is_needed() -> None:
    class Huge(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(10**7)(nn.Dense(10**7)(x))

    audit = inspect(Huge(), jax.ShapeDtypeStruct((1, 10**7), jnp.float32))
    assert len(found(audit, "Dense")) == 2


def test_a_layer_of_linen_may_be_the_model() -> None:
    audit = inspect(nn.Dense(3), jnp.ones((1, 2)))
    assert [(f.where, f.use) for f in found(audit, "Dense")] == [("(the model)", "nnx.Linear")]


def test_a_case_may_call_another_method_with_variables_of_its_own() -> None:
    embed = nn.Embed(3, 2)
    variables = embed.init(jax.random.key(0), jnp.zeros(1, int))
    case = Case(embed, (jnp.ones((1, 2)),), variables=variables, method="attend")
    (finding,) = [f for f in inspect(case).findings if f.kind == "layer"]
    assert finding.use == "nnx.Embed"


def test_a_model_that_does_not_run_is_an_error_that_says_why() -> None:
    with pytest.raises(CaseError, match="Dense does not run: "):
        inspect(nn.Dense(3), "text")


# --- Source that is read.


def test_the_classes_of_linen_modules_are_found_and_ordered(read: Audit) -> None:
    names = [cls.name for cls in read.classes]
    assert sorted(names) == ["Block", "Hooked", "Model", "Noise", "Recurrent"]
    assert all(names.index(used) < names.index(c.name) for c in read.classes for used in c.uses)
    (model,) = [cls for cls in read.classes if cls.name == "Model"]
    assert model.uses == ("Block", "Noise", "Recurrent")


def test_a_class_comes_after_those_that_it_uses_though_it_is_written_before(tmp_path: Path) -> None:
    file = tmp_path / "backwards.py"
    file.write_text(
        "from flax import linen as nn\nclass A(nn.Module):\n  def f(self): B()\n"
        "class B(nn.Module):\n  def f(self): C()\nclass C(nn.Module): pass\n"
    )
    assert [cls.name for cls in inspect(file).classes] == ["C", "B", "A"]


def test_a_setting_known_only_when_the_model_runs_is_reported_as_such(read: Audit) -> None:
    unknown, half, harmless = found(read, "LayerNorm")
    assert (unknown.route, half.route, harmless.route) == ("compat", "compat", "native")
    assert unknown.reason.startswith("depends on dtype=self.dtype: ")
    assert half.where == line_of("dtype=jnp.bfloat16")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Dense", "Dense(4)"),
        ("GRUCell", "flax.linen.GRUCell"),
        ("WeightNorm", "nn.WeightNorm"),
        ("intercept_methods", "nn.intercept_methods"),
        ("Module.is_initializing", "self.is_initializing"),
        ("hidden", 'self.sow("intermediates"'),
        ("point", "self.perturb"),
        ("noise", "self.make_rng"),
        ("counts", 'self.variable("counts"'),
        ("scale", 'self.param("scale"'),
    ],
)
def test_each_use_is_found_at_its_line(read: Audit, name: str, text: str) -> None:
    assert line_of(text) in [finding.where for finding in found(read, name)]


def test_another_name_for_a_transform_is_followed(read: Audit) -> None:
    (use,) = [finding for finding in found(read, "remat") if finding.module == "Model"]
    assert use.where == line_of("remat(Block")
    assert use.use == "nnx_bridge.remat"


def test_what_both_have_is_no_use(read: Audit) -> None:
    names = {finding.name for finding in read.findings}
    assert not names & {"Module", "relu", "compact", "initializers", "ones"}


def test_annotations_are_no_uses(tmp_path: Path) -> None:
    file = tmp_path / "annotated.py"
    file.write_text(
        "from flax import linen as nn\nclass A(nn.Module):\n  norm: nn.LayerNorm\n"
        "  def f(self, cell: nn.GRUCell) -> nn.Dense: return nn.Conv(1, 2)\n"
    )
    assert [finding.name for finding in inspect(file).findings] == ["Conv"]


def test_the_route_of_a_class_is_that_of_its_hardest_part(read: Audit) -> None:
    routes = {cls.name: read.route_of(cls.name) for cls in read.classes}
    assert routes == {
        "Block": "compat",
        "Recurrent": "compat",
        "Noise": "by hand",
        "Model": "compat",
        "Hooked": "host only",
    }
    assert read.class_counts == {"native": 0, "compat": 3, "by hand": 1, "host only": 1}


def test_a_class_is_read_with_those_that_it_uses() -> None:
    audit = inspect(models.Recurrent)
    assert [cls.name for cls in audit.classes] == ["Recurrent"]
    assert {cls.name for cls in inspect(models.Model).classes} == {
        "Block",
        "Noise",
        "Recurrent",
        "Model",
    }


def test_a_package_is_read_without_being_run(tmp_path: Path) -> None:
    package = tmp_path / "project"
    (package / "inner").mkdir(parents=True)
    (package / "a.py").write_text("from flax import linen as nn\nclass A(nn.Module): pass\n1 / 0\n")
    (package / "inner" / "b.py").write_text("from ..a import A\nclass B(A): pass\n")
    (package / "broken.py").write_text("import flax\ndef (:\n")
    seen: list[tuple[str, int, int]] = []
    audit = inspect(package, progress=lambda *step: seen.append(step))
    assert [cls.name for cls in audit.classes] == ["A", "B"]
    assert "broken.py: SyntaxError" in audit.problems[0]
    assert [step[1:] for step in seen] == [(0, 3), (1, 3), (2, 3)]


def test_classes_of_one_name_in_two_files_are_two(tmp_path: Path) -> None:
    head = "from flax import linen as nn\nclass Head(nn.Module):\n  def f(self): "
    (tmp_path / "a.py").write_text(f"{head}nn.Dense(1)\nclass A(nn.Module):\n  h = Head\n")
    (tmp_path / "b.py").write_text(f"{head}nn.GRUCell(1)\n")
    audit = inspect(tmp_path)
    routes = {cls.name.rpartition("/")[-1]: audit.route_of(cls.name) for cls in audit.classes}
    assert sorted(name.rpartition(".")[-1] for name in routes) == ["A", "Head", "Head"]
    assert sorted(routes.values()) == ["compat", "native", "native"]
    (used,) = next(cls.uses for cls in audit.classes if cls.name.endswith("A"))
    assert used.endswith("a.Head")


def modules_of(folder: Path, **files: str) -> set[str]:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return {cls.name for cls in inspect(folder).classes}


@pytest.mark.parametrize(
    ("head", "base"),
    [
        ("import flax.linen as nn", "nn.Module"),
        ("from flax import linen", "linen.Module"),
        ("import flax", "flax.linen.Module"),
        ("from flax.linen import Module as M", "M"),
        ("from flax.linen import *", "Module"),
        ("from flax import linen as nn\nBase = nn.Module", "Base"),
        ("from flax import linen as nn", "Generic, nn.RNNCellBase"),
        ("from flax.linen import Dense", "Dense"),
    ],
)
def test_a_linen_module_is_known_however_it_is_imported(
    tmp_path: Path, head: str, base: str
) -> None:
    assert modules_of(tmp_path, a=f"{head}\nclass A({base}): pass\n") == {"A"}


@pytest.mark.parametrize(
    "head",
    ["from equinox import Module", "import equinox\nModule = equinox.Module", "class Module: pass"],
)
def test_a_class_called_module_of_something_else_is_none(tmp_path: Path, head: str) -> None:
    linen = "from flax import linen as nn\nclass Module(nn.Module): pass\n"
    other = f"import flax\n{head}\nclass Other(Module): pass\n"
    assert modules_of(tmp_path, mine=linen, other=other) == {"Module"}


@pytest.mark.parametrize(
    ("head", "base"),
    [
        ("from .base import Block", "Block"),
        ("from .base import Block as Base", "Base"),
        ("from . import base as layers", "layers.Block"),
        ("from .base import *", "Block"),
        ("from project.base import Block", "Block"),
        ("import project.base", "project.base.Block"),
        ("from .passing import Passed", "Passed"),
        ("from .base import Block\nBase = Block", "Base"),
        ("from .base import Block", "Block[int]"),
    ],
)
def test_a_base_in_another_file_is_followed(tmp_path: Path, head: str, base: str) -> None:
    project = tmp_path / "project"
    project.mkdir()
    found = modules_of(
        project,
        base="from flax import linen as nn\nclass Block(nn.Module): pass\n",
        passing="from .base import Block as Passed\n",
        unlike="import flax\nclass Block: pass\nclass Plain(Block): pass\n",
        mine=f"{head}\nclass Mine({base}):\n  def f(self): return {base}()\n",
    )
    assert found == {"Block", "Mine"}
    (mine,) = (cls for cls in inspect(project).classes if cls.name == "Mine")
    assert mine.uses == ("Block",)


def test_what_is_in_a_class_inside_of_another_is_counted_once(tmp_path: Path) -> None:
    file = tmp_path / "nested.py"
    file.write_text(
        "from flax import linen as nn\nclass A(nn.Module):\n  class B(nn.Module):\n"
        "    def f(self): nn.Dense(1)\n"
    )
    assert [(f.name, f.module) for f in inspect(file).findings] == [("Dense", "B")]


def test_a_module_of_python_is_found_by_its_name() -> None:
    assert inspect("examples.small_model").classes[0].name == "MLP"


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("no_such_package", "no_such_package was found neither as a module nor as a file"),
        ("no_such_package.models", "looking for no_such_package.models: ModuleNotFoundError"),
        (int, "int is no class of Linen modules"),
    ],
)
def test_what_cannot_be_found_is_an_error(target: Any, match: str) -> None:
    with pytest.raises(CaseError, match=match):
        inspect(target)


def test_inputs_without_a_module_are_an_error() -> None:
    with pytest.raises(CaseError, match="inputs are for a Linen module"):
        inspect("examples", jnp.ones(3))


# --- What is made of it.


def test_the_audit_is_json(read: Audit) -> None:
    data = json.loads(json.dumps(read.to_json()))
    assert data["findings_by_route"]["host only"] == 1
    assert {cls["name"]: cls["route"] for cls in data["classes"]}["Noise"] == "by hand"


def test_the_table_begins_with_the_summary(read: Audit, traced: Audit) -> None:
    for audit in (read, traced):
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(audit)
        text = console.export_text()
        assert f"{len(audit.findings)} uses of Linen" in text.splitlines()[0]
        assert text.index("What is used") < text.index("in an order to rewrite them")
        assert "nnx_bridge.compat.LayerNorm" in text


def test_methods_that_python_calls_are_no_uses(tmp_path: Path) -> None:
    file = tmp_path / "models.py"
    file.write_text(
        "from flax import linen as nn\n"
        "class Model(nn.Module):\n"
        "    def encode(self, x):\n"
        "        return self.__call__(x)\n"
    )
    assert inspect(file).findings == ()

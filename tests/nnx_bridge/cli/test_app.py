"""The command `flaxlift`, as a user runs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from nnx_bridge.cli._app import app

MODULE = """
import itertools
import numpy as np
from flax import linen as nn, nnx

class Impure(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x) * next(COUNT)

COUNT = itertools.count(1)
X = np.ones((2, 3), np.float32)
def dense(): return nn.Dense(3), X
class Doubled(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)

def rewrite(): return nn.Dense(3), nnx.Linear(3, 3, rngs=nnx.Rngs(0)), X
def wrong(): return nn.Dense(3), Doubled(3, 3, rngs=nnx.Rngs(0)), X
def impure(): return Impure(), X
"""


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in a folder with a module of a user."""
    (tmp_path / "model_of_a_user.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda *args: CliRunner().invoke(app, args)


def test_agreement_is_exit_status_0(run: Run) -> None:
    result = run("check", "model_of_a_user:dense")
    assert result.exit_code == 0, result.output
    assert "comparisons agree" in result.stdout


def test_disagreement_is_exit_status_1_and_all_targets_are_checked(run: Run) -> None:
    result = run("check", "model_of_a_user:impure", "model_of_a_user:dense")
    assert result.exit_code == 1
    assert "comparisons failed" in result.stdout
    assert "comparisons agree" in result.stdout


def test_what_cannot_be_run_is_exit_status_2_and_an_error_in_plain_words(run: Run) -> None:
    result = run("check", "model_of_a_user:dens")
    assert result.exit_code == 2
    assert "did you mean model_of_a_user:dense?" in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_the_traceback_is_shown_on_request(run: Run) -> None:
    assert "Traceback" in run("check", "model_of_a_user:dens", "--traceback").stderr


def test_json_goes_to_a_file(run: Run, tmp_path: Path) -> None:
    run("check", "model_of_a_user:dense", "--json", "report.json")
    (report,) = json.loads((tmp_path / "report.json").read_text())
    assert report["agrees"] is True


def test_json_on_stdout_is_alone_there(run: Run) -> None:
    (report,) = json.loads(run("check", "model_of_a_user:dense", "--json", "-").stdout)
    assert report["name"] == "Dense"


def test_a_rewrite_is_compared_with_its_original_and_shown_on_a_page(
    run: Run, tmp_path: Path
) -> None:
    right = run("check", "model_of_a_user:rewrite", "--steps", "1")
    assert right.exit_code == 0, right.output
    wrong = run("check", "model_of_a_user:wrong", "--steps", "1", "--html", "report.html")
    assert wrong.exit_code == 1
    assert "first: module the model itself (Dense)" in " ".join(wrong.stdout.split())
    assert "<svg" not in (page := (tmp_path / "report.html").read_text())
    assert "image/svg+xml;base64" in page


def test_a_folder_that_does_not_exist_is_found_before_the_work(run: Run) -> None:
    result = run("check", "no_such_module:f", "--json", "nowhere/report.json")
    assert result.exit_code == 2
    assert "nowhere is no folder" in result.stderr


def test_inspect_reads_a_module_and_traces_a_call(run: Run) -> None:
    result = run("inspect", "model_of_a_user", "model_of_a_user:dense", "model_of_a_user:Impure")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("uses of Linen") == 3
    assert "nnx.Linear" in result.stdout


def test_inspect_fails_where_something_takes_more_work_than_allowed(run: Run) -> None:
    Path("hard.py").write_text(
        "from flax import linen as nn\nclass A(nn.Module):\n  def f(self): nn.GRUCell(3)\n"
    )
    assert run("inspect", "hard").exit_code == 0
    assert run("inspect", "hard", "--at-most", "compat").exit_code == 0
    assert run("inspect", "hard", "--at-most", "native").exit_code == 1


def test_inspect_writes_json_to_stdout_alone(run: Run) -> None:
    (audit,) = json.loads(run("inspect", "model_of_a_user", "--json", "-").stdout)
    assert [cls["name"] for cls in audit["classes"]] == ["Impure"]


@pytest.mark.parametrize("target", ["no_such", "model_of_a_user:dens", "model_of_a_user:X"])
def test_inspect_says_what_cannot_be_read(run: Run, target: str) -> None:
    result = run("inspect", target)
    assert result.exit_code == 2
    assert target in result.stderr
    assert "Traceback" not in result.output


def test_the_version_is_told() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.startswith("flaxlift ")


def test_help_shows_a_factory_and_the_exit_status() -> None:
    text = CliRunner().invoke(app, ["check", "--help"]).output
    assert "flaxlift check my_model:encoder --html report.html" in " ".join(text.split())
    assert "Exit status" in text

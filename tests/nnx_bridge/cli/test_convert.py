"""The command `flaxlift convert`, as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from typer.testing import CliRunner, Result

from nnx_bridge import match
from nnx_bridge.cli._app import app
from tests.helpers import assert_trees_equal, normal

ROOT = Path(__file__).parents[3]


def _run(*args: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, args)])


@pytest.fixture
def linen(tmp_path: Path) -> Path:
    tree = {
        "params": {"w": normal(8, 3)},
        "step": 1,
        "opt_state": [None],
        "key": jax.random.key(1),
    }
    ocp.PyTreeCheckpointer().save(tmp_path / "linen", tree)
    return tmp_path / "linen"


def test_a_conversion_says_what_it_found_and_wrote(linen: Path) -> None:
    result = _run(linen, linen.with_name("nnx"))
    assert result.exit_code == 0, result.output
    words = result.stdout.split()
    assert "train_state" in words and "nnx_train_state" in words
    assert "random numbers, in rngs/" in " ".join(words)
    assert linen.with_name("nnx").is_dir()


def test_an_error_is_in_plain_words_and_exit_status_2(linen: Path) -> None:
    linen.with_name("nnx").mkdir()
    result = _run(linen, linen.with_name("nnx"))
    assert result.exit_code == 2
    assert "exists; force=True (--force)" in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert "Traceback" in _run(linen, linen.with_name("nnx"), "--traceback").stderr


def test_a_checkpoint_that_is_not_there_is_exit_status_2(tmp_path: Path) -> None:
    result = _run(tmp_path / "nowhere", tmp_path / "nnx")
    assert result.exit_code == 2
    assert "does not exist" in " ".join(result.stderr.split())


def test_a_plan_is_read_from_its_file(tmp_path: Path) -> None:
    variables = {"params": {"Dense_0": {"kernel": normal(2, 3), "bias": normal(3)}}}

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.out = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    match(variables, Model()).save(tmp_path / "plan.json")
    ocp.PyTreeCheckpointer().save(tmp_path / "linen", variables)
    result = _run(tmp_path / "linen", tmp_path / "nnx", "--plan", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    made = ocp.PyTreeCheckpointer().restore(tmp_path / "nnx")
    assert_trees_equal(made["out"]["kernel"]["value"], normal(2, 3))
    result = _run(tmp_path / "linen", tmp_path / "other", "--plan", tmp_path / "linen")
    assert result.exit_code == 2
    assert "is no plan" in " ".join(result.stderr.split())


def test_the_cpu_stands_for_the_devices_that_arrays_lie_on(tmp_path: Path) -> None:
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices, real or simulated")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("a",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    tree = {"params": {"w": jax.device_put(normal(8, 3), sharding)}}
    ocp.PyTreeCheckpointer().save(tmp_path / "linen", tree)
    # A process of its own, in which JAX has one device.
    program = "from nnx_bridge.cli import main; main()"
    command = [sys.executable, "-c", program, "convert", tmp_path / "linen", tmp_path / "nnx"]
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    saved = ocp.PyTreeCheckpointer().metadata(tmp_path / "nnx").item_metadata["w"]["value"]
    assert saved.sharding.to_jax_sharding() == sharding


def test_a_dry_run_lists_the_arrays_and_writes_nothing(linen: Path) -> None:
    result = _run(linen, linen.with_name("nnx"), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "params/w" in result.stdout and "float32[8, 3]" in result.stdout
    assert "nnx_train_state" in result.stdout and "nothing was written" in result.stdout
    assert sorted(path.name for path in linen.parent.iterdir()) == ["linen"]
    linen.with_name("nnx").mkdir()
    assert _run(linen, linen.with_name("nnx"), "--dry-run").exit_code == 2

"""Damage, full disks and kills: an error by name, a clean destination, the source untouched."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnx_bridge import CheckpointError, convert
from nnx_bridge.checkpoints import _convert, _orbax_writer, describe
from tests.nnx_bridge.checkpoints.files import assert_same_checkpoint, content, save

ROOT = Path(__file__).parents[3]


@pytest.fixture
def linen(tmp_path: Path) -> Path:
    """A checkpoint of a few arrays that cannot be compressed away."""
    draw = np.random.default_rng(0)
    params = {f"w{i}": draw.standard_normal((40, 50)) for i in range(4)}
    return save(tmp_path / "linen", {"params": params, "step": 1, "opt_state": [None]})


def test_a_destination_that_exists_is_not_touched_without_force(linen: Path) -> None:
    destination = linen.with_name("nnx")
    destination.mkdir()
    (destination / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match=r"nnx exists; force=True \(--force\) replaces it"):
        convert(linen, destination)
    assert content(destination) == {"mine": b"mine"}
    convert(linen, destination, force=True)
    assert not (destination / "mine").exists()
    assert sorted(p.name for p in linen.parent.iterdir()) == ["linen", "nnx"]


def _killed_between_the_renames(destination: Path) -> Path:
    """What a process leaves that has moved the old destination away, and not the new one in."""
    nobody = subprocess.Popen([sys.executable, "-c", ""])
    nobody.wait()
    folder = destination.with_name(f".{destination.name}.flaxlift-{nobody.pid}-1")
    folder.mkdir()
    (folder / "new").mkdir()
    destination.rename(folder / "old")
    return folder


@pytest.mark.parametrize("name", ["nnx", "run[1]"])
def test_the_run_after_a_kill_between_the_renames_puts_the_old_one_back(
    linen: Path, name: str
) -> None:
    destination = linen.with_name(name)
    convert(linen, destination)
    before = content(destination)
    folder = _killed_between_the_renames(destination)
    with pytest.raises(CheckpointError, match=r"killed, .*/old is the old one"):
        describe(destination)
    convert(linen, destination, dry_run=True)
    assert folder.exists()
    with pytest.raises(CheckpointError, match="exists; force=True"):
        convert(linen, destination)
    assert content(destination) == before
    assert not folder.exists()


def test_the_old_destination_comes_back_where_the_new_one_cannot_take_its_place(
    linen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = linen.with_name("nnx")
    convert(linen, destination)
    before = content(destination)
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if source.name == "new":
            raise OSError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match="could not be written: PermissionError"):
        convert(linen, destination, force=True)
    assert content(destination) == before


def test_what_appears_at_the_destination_meanwhile_is_not_touched(linen: Path) -> None:
    destination = linen.with_name("linen.msgpack")

    def appears(*args: object) -> None:
        destination.write_text("mine")

    convert(linen, linen.with_name("nnx"))
    with pytest.raises(CheckpointError, match="linen.msgpack exists by now"):
        convert(linen.with_name("nnx"), destination, progress=appears)
    assert destination.read_text() == "mine"


@pytest.mark.parametrize("place", ["linen", "linen/inside", "."])
def test_source_and_destination_may_not_overlap(linen: Path, place: str) -> None:
    before = content(linen)
    with pytest.raises(CheckpointError, match="overlap"):
        convert(linen, linen.parent / place, force=True)
    assert content(linen) == before


def test_a_destination_in_a_folder_that_is_not_there_is_named_before_the_work(linen: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere, where the checkpoint is to be"):
        convert(linen, linen.parent / "nowhere" / "nnx")


def test_a_failed_conversion_with_force_leaves_the_old_destination(
    linen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(linen, linen.with_name("nnx"))
    before = content(linen.with_name("nnx"))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_convert, "write_orbax", full)
    with pytest.raises(CheckpointError, match="nnx could not be written: OSError.*No space left"):
        convert(linen, linen.with_name("nnx"), force=True)
    assert content(linen.with_name("nnx")) == before
    assert sorted(p.name for p in linen.parent.iterdir()) == ["linen", "nnx"]


def test_every_damage_to_an_orbax_checkpoint_is_named_or_without_effect(linen: Path) -> None:
    good = linen.with_name("good")
    convert(linen, good)
    files = content(linen)
    draw = random.Random(0)
    named = 0
    for name, data in files.items():
        place = draw.randrange(max(len(data), 1))
        flipped = data[:place] + bytes([(data[place] if data else 0) ^ 0x10]) + data[place + 1 :]
        for damaged in (data[:place], flipped, None):
            (linen / name).write_bytes(damaged) if damaged is not None else (linen / name).unlink()
            destination = linen.with_name("nnx")
            try:
                convert(linen, destination, force=True)
            except CheckpointError as error:
                assert str(linen) in str(error) or "linen" in str(error)
                named += 1
                assert sorted(p.name for p in linen.parent.iterdir() if p.name != "nnx") == [
                    "good",
                    "linen",
                ]
            (linen / name).write_bytes(data)
    assert named >= len(files)
    assert content(linen) == files


def test_a_source_that_fails_midway_leaves_no_writer_at_work(
    linen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    load = _orbax_writer._load

    def one_fails_and_one_is_slow(group: Any) -> Any:
        if isinstance(group[0][0], _orbax_writer._Numpy):
            raise CheckpointError("unreadable")
        time.sleep(0.3)
        written.append(group)
        return load(group)

    monkeypatch.setattr(_orbax_writer, "_load", one_fails_and_one_is_slow)
    with pytest.raises(CheckpointError, match="unreadable"):
        convert(linen, linen.with_name("nnx"))
    assert written
    assert [p.name for p in linen.parent.iterdir()] == ["linen"]


_WORKER = """
import resource, signal, sys
import nnx_bridge
source, destination, limit = sys.argv[1:]
if int(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
print("ready", flush=True)
nnx_bridge.convert(source, destination, force=True)
print("done", flush=True)
"""


def _start(source: Path, destination: Path, limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WORKER, str(source), str(destination), str(limit)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_disk_that_takes_no_more_is_named_and_leaves_nothing(linen: Path) -> None:
    before = content(linen)
    _, errors = _start(linen, linen.with_name("nnx"), limit=20_000).communicate(timeout=60)
    assert "CheckpointError" in errors and "nnx could not be written" in errors
    assert [p.name for p in linen.parent.iterdir()] == ["linen"]
    assert content(linen) == before


def test_a_kill_at_any_moment_leaves_no_half_checkpoint(linen: Path) -> None:
    before = content(linen)
    whole = linen.with_name("whole")
    convert(linen, whole)
    destination = linen.with_name("nnx")
    for delay in (0.0, 0.02, 0.1):
        process = _start(linen, destination)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if destination.exists():
            assert_same_checkpoint(destination, whole)
    assert content(linen) == before
    # What the killed ones left is swept away by the next.
    convert(linen, destination, force=True)
    assert sorted(p.name for p in linen.parent.iterdir()) == ["linen", "nnx", "whole"]

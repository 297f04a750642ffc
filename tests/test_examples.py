"""The examples run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def test_the_digits_example_prints_and_saves_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("sklearn", "matplotlib", "optax"):
        pytest.importorskip(package)
    from examples import dropconnect_digits

    monkeypatch.setattr(dropconnect_digits, "STEPS", 3)
    monkeypatch.setattr(dropconnect_digits, "SAMPLES", 2)
    monkeypatch.setattr(sys, "argv", ["digits", "--seeds", "1", "--save", str(tmp_path)])
    dropconnect_digits.main()
    text = (tmp_path / "dropconnect_digits.md").read_text()
    assert text in capsys.readouterr().out
    assert all(f"| {method} |" in text for method in dropconnect_digits.METHODS)
    assert (tmp_path / "dropconnect_digits.png").stat().st_size > 0

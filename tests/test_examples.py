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


def test_the_heat_equation_is_solved_from_its_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    from examples import physics_informed

    monkeypatch.setattr(sys, "argv", ["heat", "--steps", "300"])
    assert physics_informed.main() < 0.15
    monkeypatch.setattr(sys, "argv", ["heat", "--steps", "300", "--linen"])
    assert physics_informed.main() < 0.15


def test_forces_are_learnt_through_the_gradient_of_the_energy() -> None:
    from examples import energy_and_forces

    assert energy_and_forces.main(steps=1) > 0.9
    assert energy_and_forces.main(steps=150) < 0.8


def test_the_score_is_learnt_from_samples() -> None:
    from examples import score_matching

    assert score_matching.main(steps=1)[0] > 0.8
    assert score_matching.main(steps=200)[0] < 0.5


def test_the_laplace_approximation_doubts_what_is_far_from_the_data() -> None:
    from examples import laplace

    points, deviations = laplace.main(steps=300)
    inside = abs(points[:, 0]) <= 1
    assert deviations[inside].max() < 0.5 * deviations[~inside].min()


def test_attention_maps_and_their_gradients_are_equal_in_linen_and_hosted() -> None:
    from examples import attention_gradients

    scores = attention_gradients.main()
    assert set(scores) == {"Attention_0", "Attention_1"}
    assert all(layer.shape == (10, 10) and layer.sum() > 0 for layer in scores.values())


@pytest.mark.slow
def test_a_classifier_of_digits_goes_on_in_nnx_as_it_would_have_in_linen(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from examples import digits_migration

    page = digits_migration.main(tmp_path, before=1, after=1).read_text(encoding="utf-8")
    assert page.count("<td>0</td>") == 3
    assert "all agree" in page


def test_a_resnet_moved_block_by_block_learns_as_the_one_that_stays() -> None:
    from examples import resnet_block_by_block

    losses = resnet_block_by_block.main(steps=2)
    assert len(losses) == resnet_block_by_block.BLOCKS + 1
    assert all(abs(moved - stays) < 1e-5 for moved, stays in losses)
    assert losses[-1][0] < losses[0][0]

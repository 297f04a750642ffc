"""Rows, verdicts, and how a report is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from nnx_bridge import Parting, Report, Row, Verdict
from nnx_bridge.equivalence._verdict import TOLERANCE, Noise, compare_arrays, raised

ONES = jnp.ones((2, 3))


def report(*rows: Row) -> Report:
    return Report("Model", rows, seeds=(0,), versions={"flax": "1", "jax": "2"})


def row(actual: Any, reference: Any, path: str = "kernel") -> Row:
    (only,) = compare_arrays("output", "lifted on NNX", {path: actual}, {path: reference})
    return only


def shown(report: Report) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(report)
    return console.export_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64", "int32", "bool"])
def test_equal_arrays_are_equal(dtype: str) -> None:
    assert row(ONES.astype(dtype), ONES.astype(dtype)).verdict is Verdict.EQUAL


def test_equal_keys_are_equal_and_others_are_not() -> None:
    key, other = jax.random.key(0), jax.random.key(1)
    assert row(key, key).verdict is Verdict.EQUAL
    assert row(key, other).verdict is Verdict.DIFFERS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tolerance_is_in_roundings_of_the_largest_value(dtype: str) -> None:
    reference = jnp.asarray([0.0, 1000.0], dtype)
    unit = float(jnp.finfo(dtype).eps) * 1000
    within = row(reference.at[0].set(1.8 * TOLERANCE * unit), reference)
    beyond = row(reference.at[0].set(2.2 * TOLERANCE * unit), reference)
    assert within.verdict is Verdict.ROUNDING
    assert within.max_roundings == pytest.approx(1.8 * TOLERANCE, rel=0.01)
    assert beyond.verdict is Verdict.DIFFERS


def test_integers_must_be_equal() -> None:
    huge = np.array([2**62], np.int64)
    assert row(huge + 1, huge).verdict is Verdict.DIFFERS
    assert row(huge + 1, huge).max_error == 1.0


def test_anything_but_zero_differs_from_zero() -> None:
    assert row(ONES * 1e-30, 0 * ONES).verdict is Verdict.DIFFERS


def test_equal_infinities_are_equal() -> None:
    assert row(ONES * jnp.inf, ONES * jnp.inf).verdict is Verdict.EQUAL
    assert row(ONES, ONES * jnp.inf).verdict is Verdict.DIFFERS


def test_what_is_not_a_number_never_agrees_and_is_counted() -> None:
    found = row(ONES.at[0, 0].set(jnp.nan), ONES.at[0, 0].set(jnp.nan), path="logits")
    assert found.verdict is Verdict.NAN
    assert "logits: not a number: 1 of 6 values are no numbers, and 1 in the reference" in shown(
        report(found)
    )


def test_another_shape_or_dtype_is_a_verdict_of_its_own() -> None:
    assert row(jnp.ones((3, 2)), ONES).verdict is Verdict.SHAPE
    assert row(ONES.astype(jnp.bfloat16), ONES).verdict is Verdict.DTYPE


def test_arrays_that_only_one_side_has_are_found() -> None:
    rows = list(compare_arrays("state", "lifted on NNX", {"a": ONES}, {"b": ONES}))
    assert [(r.path, r.verdict) for r in rows] == [
        ("b", Verdict.MISSING),
        ("a", Verdict.UNEXPECTED),
    ]


def test_a_report_agrees_only_if_something_was_compared_and_all_agrees() -> None:
    good, bad = row(ONES, ONES), row(ONES, 2 * ONES)
    assert report(good).agrees
    assert not report(good, bad).agrees
    assert not report().agrees
    assert "nothing was compared" in shown(report())


def test_assert_equal_names_what_and_where() -> None:
    report(row(ONES, ONES)).assert_equal()
    with pytest.raises(AssertionError, match="output, lifted on NNX, kernel: differs by 1, "):
        report(row(ONES, 2 * ONES)).assert_equal()


def test_the_table_shows_each_kind_once_and_each_failure() -> None:
    text = shown(report(row(ONES, ONES, "a"), row(ONES, 2 * ONES, "b")))
    assert "1 of 2 disagree" in text
    assert "output, lifted on NNX, b: differs" in text
    assert "Model: 1 of 2 comparisons failed" in text


def test_many_failures_are_cut_short() -> None:
    text = shown(report(*(row(ONES, 2 * ONES, f"kernel_{i}") for i in range(50))))
    assert "and 30 more" in text


def test_an_error_is_shown_once() -> None:
    error = ValueError("[red] is no markup :smile:")
    rows = [raised(what, "lifted on NNX", error) for what in ("input gradient", "state")]
    text = shown(report(*rows))
    assert text.count("ValueError: [red] is no markup :smile:") == 1


def test_json_is_plain_and_complete() -> None:
    data = report(row(ONES, ONES), row(ONES, 0 * ONES)).to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["agrees"] is False
    assert data["rows"][1]["shape"] == [2, 3]
    assert data["rows"][1]["max_roundings"] is None


def test_the_page_names_what_differs_and_needs_nothing_else() -> None:
    parting = Parting("layer", "module", "Dense", "training", "its output <differs>")
    rows = (row(ONES, ONES), row(ONES, 2 * ONES, "bias"))
    page = Report("Model", rows, (0,), {"jax": "2"}, ("jvp",), parting).to_html()
    assert "<code>layer</code>" in page and "&lt;differs&gt;" in page
    assert "Skipped: jvp" in page
    assert "1.0 in the model, 2.0 in the reference" in page
    assert "http" not in page and "src=" not in page


def test_a_report_is_saved_by_the_ending_of_the_name(tmp_path: Path) -> None:
    for name, start in (("report.json", "{"), ("report.html", "<!doctype html>")):
        report(row(ONES, ONES)).save(tmp_path / name)
        assert (tmp_path / name).read_text().startswith(start)


def masked(value: float) -> Any:
    """Logits of which one is masked; and the noise of a reference that is exact."""
    reference = jnp.array([-1e9, 0.5, 0.0])
    exact = {"y": np.asarray(reference, np.float64)}
    noise = Noise(exact, {}, {"y": float(jnp.finfo("float32").eps)})
    (only,) = compare_arrays(
        "output", "m", {"y": reference.at[1].set(value)}, {"y": reference}, noise
    )
    return only


def test_a_masked_logit_hides_no_fault_in_its_neighbours() -> None:
    assert masked(0.5 + 1e-7).verdict is Verdict.ROUNDING
    assert masked(0.50001).verdict is Verdict.DIFFERS
    assert masked(0.50001).worst[0].index == (1,)


def test_an_array_of_zeros_is_measured_with_its_largest_sibling() -> None:
    reference = {"used": jnp.ones(3), "unused": jnp.zeros(3)}
    exact = {path: np.asarray(x, np.float64) for path, x in reference.items()}
    noise = Noise(exact, {}, dict.fromkeys(reference, float(jnp.finfo("float32").eps)))

    def verdict(value: float) -> Verdict:
        found = {**reference, "unused": jnp.full(3, value)}
        return next(
            r.verdict
            for r in compare_arrays("gradient", "m", found, reference, noise)
            if r.path == "unused"
        )

    assert verdict(1e-8) is Verdict.ROUNDING
    assert verdict(1e-5) is Verdict.DIFFERS

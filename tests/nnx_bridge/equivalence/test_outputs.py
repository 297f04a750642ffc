"""Inputs and outputs of any kind: integers alone, texts, dicts with keys that have no order."""

from __future__ import annotations

import enum
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from nnx_bridge import Report, compare

X = jax.ShapeDtypeStruct((8, 4), "float32")


class Kind(enum.Enum):
    """Members of an enumeration have no order."""

    IMAGE = 1
    TEXT = 2


class Decoder(nn.Module):
    """Gives tokens alone."""

    bias: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        logits = nn.Dense(3)(x)
        return (logits + jnp.array([self.bias, 0.0, 0.0])).argmax(-1)


class Saying(nn.Module):
    """Gives more than arrays."""

    word: Any = "tanh"

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        return {"y": nn.tanh(nn.Dense(3)(x)), "word": self.word}


class Mixing(nn.Module):
    """Takes, hands on and gives dicts whose keys are members of an enumeration."""

    factor: float = 1.0

    @nn.compact
    def __call__(self, inputs: dict[Kind, Any]) -> dict[Kind, jax.Array]:
        mixed = {**inputs, Kind.TEXT: nn.Dense(4)(inputs[Kind.TEXT])}
        return Mixed(self.factor, name="mixed")(mixed)


class Mixed(nn.Module):
    factor: float

    def __call__(self, inputs: dict[Kind, Any]) -> dict[Kind, jax.Array]:
        return {Kind.IMAGE: inputs[Kind.IMAGE] * self.factor, Kind.TEXT: inputs[Kind.TEXT]}


def check(reference: Any, model: Any, x: Any = X) -> Report:
    return compare(reference, model, x, seeds=1, steps=2)


def test_integers_alone_are_compared_exactly_and_without_derivatives() -> None:
    report = check(Decoder(), Decoder())
    report.assert_equal()
    assert report.skipped == ("derivatives: Decoder returns no floating point array",)
    wrong = check(Decoder(), Decoder(9.0))
    assert ("output", "result") in {(row.what, row.path) for row in wrong.failures}
    assert wrong.parting is not None
    assert "it is after Dense_0" in wrong.parting.reason


@pytest.mark.parametrize("word", ["relu", "cos", b"tanh!", Kind.TEXT])
def test_texts_must_be_equal(word: Any) -> None:
    check(Saying(word), Saying(word)).assert_equal()
    report = check(Saying(), Saying(word))
    assert {row.path for row in report.failures} == {"word (text)"}


def test_what_is_not_compared_is_said() -> None:
    report = check(Saying(print), Saying(print))
    report.assert_equal()
    said = "output word, a builtin_function_or_method: only arrays, numbers and texts are compared"
    assert report.skipped == (said,)


def test_keys_without_an_order_may_be_in_inputs_and_outputs() -> None:
    x = {Kind.TEXT: X, Kind.IMAGE: X}
    report = check(Mixing(), Mixing(), x)
    report.assert_equal()
    compared = {(row.what, row.path) for row in report.rows}
    assert {
        ("output", "Kind.IMAGE"),
        ("layer output", "mixed [Kind.TEXT]"),
        ("input gradient", "args/0/Kind.TEXT"),
    } <= compared
    wrong = check(Mixing(), Mixing(2.0), x)
    assert wrong.parting is not None
    assert wrong.parting.path == "mixed"

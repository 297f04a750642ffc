"""A model with one fault is found out, and the report says where the fault is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from nnx_bridge import Random, compare
from tests.nnx_bridge.equivalence import models as m

X = jax.ShapeDtypeStruct((6, 4), "float32")
IMAGES = jax.ShapeDtypeStruct((2, 4, 4, 3), "float32")
TOKENS = Random((2, 5), "int32", high=11)
SEQUENCE = jax.ShapeDtypeStruct((2, 4, 3), "float32")
ROWS = jax.ShapeDtypeStruct((4, 3), "float32")


def mlp(mode: bool | None = None, **fault: Any) -> Any:
    return m.Mlp(), m.MlpRewrite(nnx.Rngs(0), **fault), X, {} if mode is None else {"train": mode}


def images(**fault: Any) -> Any:
    return m.Images(), m.ImagesRewrite(nnx.Rngs(0), **fault), IMAGES, {}


def text(**fault: Any) -> Any:
    return m.Text(), m.TextRewrite(nnx.Rngs(0), **fault), TOKENS, {}


FAULTS: dict[str, tuple[Any, str, str, str]] = {
    # The fault: the models; and the kind, the path and the reason that must be named.
    "epsilon": (mlp(False, epsilon=1e-3), "module", "LayerNorm_0", "output does not"),
    "momentum": (mlp(momentum=0.8), "variable", "batch_stats/BatchNorm_0/mean", "state"),
    "activation": (
        mlp(False, activation=nnx.relu), "module", "", "after BatchNorm_0 and before Dropout_0",
    ),
    "missing residual": (
        mlp(False, residual=False), "module", "", "after mix and before LayerNorm_0",
    ),
    "another dropout mask": (mlp(True, rate=0.4), "module", "Dropout_0", "output does not"),
    "forgotten dropout": (mlp(True, rate=0.0), "module", "Dropout_0", "output does not"),
    "dtype": (mlp(False, mix_dtype=jnp.bfloat16), "module", "mix", "output does not"),
    "statistics not updated": (
        mlp(norm=m.Frozen), "variable", "batch_stats/BatchNorm_0/mean", "state",
    ),
    "bias": (mlp(False, mix=m.NegativeBias), "module", "mix", "output does not"),
    "transposed kernel": (mlp(False, mix=m.Transposed), "module", "mix", "output does not"),
    "scale missing": (
        mlp(False, scale=False), "variable", "params/LayerNorm_0/scale", "the model has no",
    ),
    "gradient stopped": (
        mlp(False, mix=m.Stopped), "module", "mix", "parameter params/mix/kernel does not",
    ),
    "gradient halved": (mlp(False, mix=m.Halved), "module", "mix", "its inputs does not"),
    "call writes a parameter": (
        mlp(False, mix=m.WritesBack), "variable", "params/mix/kernel", "parameter after the call",
    ),
    "padding": (images(conv={"padding": "CIRCULAR"}), "module", "Conv_0", "output does not"),
    "stride": (images(conv={"strides": 1}), "module", "Conv_0", "output does not"),
    "axis of a norm": (
        images(norm={"reduction_axes": 1}), "module", "LayerNorm_0", "output does not",
    ),
    "scale of attention": (text(scaled=False), "module", "attention", "output does not"),
    "causal mask": (text(shift=1), "module", "", "after embed and before attention"),
    "swapped layers": (text(swap=True), "module", "", "before layers_0"),
    "initial carry": (
        (m.Sequence(), m.SequenceRewrite(nnx.Rngs(0), carry=0.1), SEQUENCE, {}),
        "module", "rnn", "output does not",
    ),
    "second step": (
        (m.Memory(), m.MemoryRewrite(nnx.Rngs(0), adds=False), ROWS, {}),
        "variable", "memory/last", "state, step 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_place_of_a_fault_is_named(fault: str) -> None:
    (reference, model, inputs, kwargs), kind, path, reason = FAULTS[fault]
    steps = 3 if fault == "second step" else 1
    report = compare(reference, model, inputs, kwargs=kwargs, seeds=1, steps=steps)
    assert not report.agrees
    assert report.parting is not None
    assert (report.parting.kind, report.parting.path) == (kind, path), report.parting
    assert reason in report.parting.reason


def test_weights_that_were_loaded_into_each_others_place_are_named() -> None:
    reference = nn.Sequential([nn.Dense(3), nn.Dense(3)])
    variables = reference.init(jax.random.key(0), jnp.ones((1, 3)))
    model = nnx.Sequential(*(nnx.Linear(3, 3, rngs=nnx.Rngs(0)) for _ in range(2)))
    for ours, theirs in ((0, 1), (1, 0)):
        model.layers[ours].kernel[...] = variables["params"][f"layers_{theirs}"]["kernel"]
    report = compare(reference, model, jnp.ones((2, 3)), variables=variables, seeds=1)
    assert [(row.what, row.path) for row in report.failures] == [
        ("variable", "params/layers/0/kernel"),
        ("variable", "params/layers/1/kernel"),
    ]
    assert report.parting is not None and "load the weights" in report.parting.reason


BF16 = jnp.bfloat16


def test_a_fault_below_the_noise_of_bfloat16_is_found_in_float64() -> None:
    model = m.MlpRewrite(nnx.Rngs(0), dtype=BF16, epsilon=1e-5)
    report = compare(m.Mlp(BF16), model, X, kwargs={"train": False}, seeds=1, steps=1)
    assert {row.route for row in report.failures} == {"prediction in float64"}
    assert report.parting is not None
    assert report.parting.path == "LayerNorm_0"


class Gelu(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.gelu(nn.Dense(8, dtype=BF16)(x).astype(self.dtype)).astype(BF16)
        return nn.Dense(3, dtype=BF16)(h)


def test_a_constant_that_is_rounded_otherwise_is_no_fault() -> None:
    report = compare(Gelu(BF16), Gelu(jnp.float32), X, seeds=1, steps=1)
    report.assert_equal()
    assert "Gelu in float64" in {row.route for row in report.rows}

"""Models are compared through the plan by which they were loaded."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from nnx_bridge import CaseError, Plan, assert_equivalent, compare, load, match
from nnx_bridge.weights import Transpose
from tests.helpers import assert_trees_equal

KEY = jax.random.key(0)
X = jax.ShapeDtypeStruct((2, 3), "float32")
WORDS = jnp.array([[1, 2, 3, 0], [4, 0, 2, 2]])


class Mlp(nn.Module):
    """Two layers of one shape."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(3)(x))
        return nn.Dense(3)(x)


class Rewrite(nnx.Module):
    """The same under other names."""

    def __init__(self) -> None:
        self.enter, self.leave = (nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.leave(nnx.relu(self.enter(x)))


NAMES = [("Dense_0", "enter"), ("Dense_1", "leave")]


def loaded() -> tuple[Any, Rewrite, Plan]:
    variables, model = Mlp().init(KEY, jnp.ones((2, 3))), Rewrite()
    return variables, model, load(model, variables, NAMES)


def test_names_are_those_of_the_plan() -> None:
    variables, model, plan = loaded()
    report = assert_equivalent(Mlp(), model, X, variables=variables, correspondence=plan, seeds=1)
    layers = {row.path for row in report.rows if row.what == "layer output"}
    assert layers == {"", "Dense_0", "Dense_1"}
    parameters = {row.path for row in report.rows if row.what == "parameter gradient"}
    assert "params/Dense_0/kernel" in parameters and len(parameters) == 4


def test_layers_of_one_shape_that_were_exchanged_after_a_load_are_named() -> None:
    variables, model, plan = loaded()
    model.enter.kernel, model.leave.kernel = model.leave.kernel, model.enter.kernel
    report = compare(Mlp(), model, X, variables=variables, correspondence=plan, seeds=1, steps=1)
    assert report.parting is not None and report.parting.kind == "variable"
    assert "enter/kernel" in str(report.parting) and "load the weights" in str(report.parting)


def test_a_plan_that_exchanges_layers_is_found_out() -> None:
    variables = Mlp().init(KEY, jnp.ones((2, 3)))
    wrong = match(variables, Rewrite(), [("Dense_0", "leave"), ("Dense_1", "enter")])
    assert not compare(Mlp(), Rewrite(), X, correspondence=wrong, seeds=1, steps=1).agrees


def test_gates_that_are_one_matrix_are_compared_as_those_of_the_reference() -> None:
    class Tagger(nn.Module):
        @nn.compact
        def __call__(self, words: jax.Array) -> jax.Array:
            x = nn.RNN(nn.OptimizedLSTMCell(4))(nn.Embed(5, 3)(words))
            return nn.Dense(2)(x)

    class Native(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.words = nnx.Embed(5, 3, rngs=rngs)
            self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(3, 4, rngs=rngs), rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, words: jax.Array) -> jax.Array:
            return self.head(self.rnn(self.words(words)))

    model = Native(nnx.Rngs(0))
    plan = match(Tagger().init(KEY, WORDS), model)
    report = assert_equivalent(Tagger(), model, WORDS, correspondence=plan, seeds=1, steps=2)
    gates = [row for row in report.rows if "OptimizedLSTMCell_0/h" in row.path]
    assert {row.shape for row in gates if row.path.endswith("kernel")} == {(4, 4)}
    # The cell of the model has two layers, which stand for none of the reference's eight.
    layers = {row.path for row in report.rows if row.what == "layer output"}
    assert {"Embed_0", "Dense_0"} <= layers and not any("dense_" in path for path in layers)


def test_layers_in_a_list_and_statistics_are_paired() -> None:
    class Stack(nn.Module):
        def setup(self) -> None:
            self.mlp = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(3)])
            self.norm = nn.BatchNorm()

        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            return self.norm(self.mlp(x), use_running_average=not train)

    class Native(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            layers = nnx.Linear(3, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 3, rngs=rngs)
            self.mlp, self.norm = nnx.Sequential(*layers), nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.norm(self.mlp(x))

    model = Native(nnx.Rngs(0))
    plan = match(Stack().init(KEY, jnp.ones((2, 3)), train=False), model)
    report = assert_equivalent(Stack(), model, X, correspondence=plan, seeds=1, steps=2)
    layers = {row.path for row in report.rows if row.what == "layer output"}
    assert {"mlp", "mlp/layers_0", "mlp/layers_2", "norm"} <= layers
    assert "batch_stats/norm/mean" in {row.path for row in report.rows if row.what == "state"}


def test_a_layout_and_a_cast_of_the_plan_hold_for_gradients() -> None:
    class Rows(nnx.Module):
        def __init__(self) -> None:
            self.weight = nnx.Param(jnp.zeros((2, 3)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.weight[...].T

    reference = nn.Dense(2, use_bias=False)
    variables = reference.init(KEY, jnp.ones((2, 3)))
    plan = match(variables, Rows(), [("kernel", "weight", Transpose())])
    report = assert_equivalent(reference, Rows(), X, correspondence=plan, seeds=1, steps=2)
    (row,) = (row for row in report.rows if row.what == "parameter gradient")
    assert (row.path, row.shape) == ("params/kernel", (3, 2))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    cast = match(half, Rows(), [("kernel", "weight", Transpose())], cast=["weight"])
    module = nn.Dense(2, use_bias=False, param_dtype=jnp.bfloat16)
    assert_equivalent(module, Rows(), X, correspondence=cast, seeds=1, steps=1)


def test_what_has_no_place_in_the_model_is_named_with_the_reason() -> None:
    x = jnp.ones((2, 3))
    cell, model = nn.GRUCell(3), nnx.GRUCell(3, 3, rngs=nnx.Rngs(0))
    variables = cell.init(KEY, x, x)
    plan = match(variables, model)
    report = compare(cell, model, X, X, correspondence=plan, seeds=1, steps=1)
    assert report.parting is not None and report.parting.path == "params/hn/bias"
    assert "the model has none" in str(report.parting)


def test_the_callers_model_stays_as_it_was() -> None:
    variables, model, plan = loaded()
    before = nnx.to_pure_dict(nnx.state(model))
    compare(Mlp(), model, X, variables=variables, correspondence=plan, seeds=1, steps=1)
    assert_trees_equal(nnx.to_pure_dict(nnx.state(model)), before)


def test_a_plan_for_other_models_is_an_error() -> None:
    variables, model, plan = loaded()
    with pytest.raises(CaseError, match=r"other models:(\n.*)*Dense_1/bias.*came nothing"):
        compare(nn.Dense(3), model, X, correspondence=plan)
    with pytest.raises(CaseError, match="a plan leads to an NNX module, and Mlp is none"):
        compare(Mlp(), Mlp(), X, correspondence=plan)
    broken = dataclasses.replace(plan, rows=plan.rows[1:])
    with pytest.raises(CaseError, match="the plan cannot be applied"):
        compare(Mlp(), model, X, correspondence=broken)

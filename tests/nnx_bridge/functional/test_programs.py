"""The lifted program is the raw program: on NNX modules every transform has the jaxpr, the results
and the writes of the raw JAX transform over `nnx.split` and `nnx.merge`."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

from tests.helpers import assert_same_program, assert_trees_equal, normal, strict
from tests.nnx_bridge import models
from tests.nnx_bridge.raw import PAIRS, of_state, ours

X = normal(4, 3)


@pytest.mark.parametrize("transform", PAIRS)
@pytest.mark.parametrize("model", models.MODELS)
def test_the_program(model: str, transform: str) -> None:
    mdl = models.make(models.MODELS[model])
    actual, expected = PAIRS[transform]
    state = nnx.state(mdl)
    assert_same_program(of_state(ours(actual), mdl), of_state(expected, mdl), state, X)


@pytest.mark.parametrize("transform", PAIRS)
@pytest.mark.parametrize("model", ["noisy", "counter"])
def test_results_and_writes(model: str, transform: str) -> None:
    mdl = models.make(models.MODELS[model])
    actual, expected = PAIRS[transform]
    with strict():
        result, state = ours(actual)(mdl, X)
    wanted, wanted_state = expected(mdl, X)
    assert_trees_equal(jax.tree.leaves(result), jax.tree.leaves(wanted))
    assert_trees_equal(state, wanted_state)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "linearize", "hvp"])
def test_variable_gradients_have_the_form_of_the_state(transform: str) -> None:
    mdl = models.make(models.Norm)
    actual, expected = PAIRS[transform]
    result, wanted = ours(actual)(mdl, X)[0], expected(mdl, X)[0]
    assert jax.tree.structure(result) == jax.tree.structure(wanted)

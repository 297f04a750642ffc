"""Bad input of a host is named by path, and leaves the host as it was."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import errors, nnx
from flax import linen as nn

import nnx_bridge
from nnx_bridge import Host, check_variables
from tests.helpers import assert_trees_equal
from tests.nnx_bridge.host.models import KEYS, Net, X


def notes(error: Any) -> str:
    return "\n".join(error.value.__notes__)


def test_variables_of_another_model_are_listed_with_the_nearest() -> None:
    module, variables = nnx_bridge.unhost(Host.init(Net(), KEYS, X))
    params = dict(variables["params"])
    params["encoders"] = params.pop("encoder")
    host = Host(module, {**variables, "params": params})
    with pytest.raises(
        errors.ScopeParamNotFoundError, match='"kernel" in scope "/encoder'
    ) as error:
        host(X)
    wrong, right = "params/encoders/Dense_0/kernel", "params/encoder/Dense_0/kernel"
    assert f"missing: {right} (the nearest on the other side: {wrong})" in notes(error)
    assert f"not of this module: {wrong}" in notes(error)
    assert "Raised in the Linen module encoder/Dense_0 (Dense)" in notes(error)


def test_inputs_that_do_not_fit_are_an_error_with_the_path() -> None:
    host = Host.init(Net(), KEYS, X)
    before = nnx_bridge.unhost(host)[1]
    with pytest.raises(errors.ScopeParamShapeError, match='"kernel" in "/embed"') as error:
        host(jnp.ones((2, 5)))
    assert "params/embed/kernel: expected shape (5, 4), found (4, 4)" in notes(error)
    assert_trees_equal(nnx_bridge.unhost(host)[1], before)


def test_a_call_that_fails_leaves_the_streams() -> None:
    host = Host.init(Net(), KEYS, X)
    before = nnx.to_pure_dict(nnx.state(host, nnx.RngCount))
    assert jax.tree.leaves(before)
    with pytest.raises(errors.ScopeParamShapeError, match="/embed"):
        host(jnp.ones((2, 5)), True)
    assert_trees_equal(nnx.to_pure_dict(nnx.state(host, nnx.RngCount)), before)


def test_a_check_finds_what_is_not_finite_and_what_is_too_much() -> None:
    host = Host.init(Net(), KEYS, X)
    check_variables(host, X)
    host.embed.kernel[...] = host.embed.kernel[...].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="params/embed/kernel: 1 NaN and 0 infinite of 16"):
        check_variables(host, X)
    check_variables(host, X, finite=False)
    module, variables = nnx_bridge.unhost(host)
    more = {**variables, "params": {**variables["params"], "head": {"bias": jnp.ones(2)}}}
    with pytest.raises(ValueError, match="not of this module: params/head/bias"):
        check_variables(Host(module, more), X, finite=False)


def test_parameters_without_their_collection_are_known_as_such() -> None:
    module, variables = nnx_bridge.unhost(Host.init(Net(), KEYS, X))
    host = Host(module, {"batch_stats": variables["batch_stats"], **variables["params"]})
    with pytest.raises(errors.ScopeCollectionNotFound, match='"kernel"') as error:
        host(X)
    assert "without their collection: write {'params': parameters}" in notes(error)


@pytest.mark.parametrize("variables", [None, [jnp.ones(2)]])
def test_variables_that_are_no_dicts(variables: Any) -> None:
    with pytest.raises(TypeError, match="variables must be nested dicts by collection.* got"):
        Host(Net(), variables)


def test_a_node_has_no_module_that_could_be_given_back() -> None:
    host: Any = Host.init(Net(), KEYS, X)
    for function in (nnx_bridge.unhost, check_variables):
        with pytest.raises(TypeError, match=r"expected an nnx_bridge.Host, got its node embed"):
            function(host.embed)
        with pytest.raises(TypeError, match=r"expected an nnx_bridge.Host, got Net"):
            function(Net())


def test_one_key_serves_all_streams() -> None:
    module, variables = nnx_bridge.unhost(Host.init(Net(), KEYS, X))
    key = jax.random.key(3)
    expected, _ = module.apply(
        variables, X, True, rngs=jax.random.fold_in(key, 0), mutable=["batch_stats"]
    )
    assert_trees_equal(Host(module, variables, rngs=key)(X, True), expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (nn.Dense(4), r"embed: only an NNX module .* got Dense; host it first: Host.init\("),
        (None, "embed: only an NNX module replaces a submodule, got NoneType"),
        (jnp.tanh, "embed: only an NNX module replaces a submodule, got"),
        (nnx.Param(X), "embed: only an NNX module replaces a submodule, got"),
    ],
)
def test_only_modules_replace_submodules(value: Any, message: str) -> None:
    host = Host.init(Net(), KEYS, X)
    before = nnx_bridge.unhost(host)[1]
    with pytest.raises(TypeError, match=message):
        host.embed = value
    assert_trees_equal(nnx_bridge.unhost(host)[1], before)


def test_an_array_does_not_take_the_place_of_a_variable() -> None:
    host: Any = Host.init(Net(), KEYS, X)
    with pytest.raises(TypeError, match=r"embed/kernel is a Variable, .*\.kernel\[\.\.\.\] = "):
        host.embed.kernel = jnp.zeros((4, 4))
    host.embed.kernel = nnx.Param(jnp.zeros((4, 4)))
    assert not host.embed(X).any()

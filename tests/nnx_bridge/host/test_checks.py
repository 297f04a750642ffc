"""Bad input of a host is named by path, and leaves the host as it was."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest
from flax import errors, nnx

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
    before = nnx.state(host, nnx.RngCount)
    with pytest.raises(errors.ScopeParamShapeError, match="/embed"):
        host(jnp.ones((2, 5)), True)
    assert_trees_equal(nnx.state(host, nnx.RngCount), before)


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

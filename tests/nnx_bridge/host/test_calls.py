"""How hosts and nodes may be called: methods, keys, caches."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import errors, nnx
from flax import linen as nn

import nnx_bridge
from nnx_bridge import Host
from tests.helpers import assert_trees_close, assert_trees_equal, normal
from tests.nnx_bridge.host.models import KEYS, Net, X

NET = Net()


@pytest.mark.parametrize(
    "method",
    [
        lambda _: "encode",
        lambda _: Net.encode,
        lambda _: NET.encode,
        lambda model: model.encode,
        lambda _: lambda module, x, train=False: module.encode(x, train),
    ],
    ids=["name", "function", "of the module", "of the host", "lambda"],
)
def test_a_method_is_given_in_any_form(method: Callable[[Host], Any]) -> None:
    model = Host.init(NET, KEYS, X)
    module, variables = nnx_bridge.unhost(model)
    for train in (True, False):
        expected = module.apply(variables, X, train, rngs=KEYS, method="encode")
        assert_trees_equal(model(X, train, rngs=KEYS, method=method(model)), expected)
    model.train()  # An argument of the call wins, whatever binds the method.
    assert_trees_equal(model(X, False, method=method(model)), expected)


def test_a_method_of_a_node_is_given_in_any_form() -> None:
    model = Host.init(nn.Sequential([nn.Embed(7, 4)]), KEYS, jnp.array([1]))
    expected = X @ model.layers_0.embedding.get_value().T
    for method in ("attend", nn.Embed.attend, model.layers_0.attend, lambda e, x: e.attend(x)):
        assert_trees_equal(model.layers_0(X, method=method), expected)


def test_a_method_that_is_not_there_is_an_error_with_the_nearest_name() -> None:
    model = Host.init(NET, KEYS, X)
    for node in (model, model.encoder):
        with pytest.raises(AttributeError, match="has no method 'encod_'; .*known: __call"):
            node(X, method="encod_")


@pytest.mark.parametrize(
    ("rngs", "note"),
    [
        (None, r"no streams: make it with some, Host\(\.\.\., rngs="),
        ({"droput": KEYS["dropout"]}, "had keys for the streams 'droput'"),
        (nnx.Rngs(noise=0), "had keys for the streams 'noise'"),
    ],
    ids=["none", "misspelt", "streams"],
)
def test_a_missing_stream_is_an_error_that_names_those_that_are_there(rngs: Any, note: str) -> None:
    model = Host(*nnx_bridge.unhost(Host.init(NET, KEYS, X)))
    for node in (model, model.encoder):
        with pytest.raises(errors.InvalidRngError, match='needs PRNG for "dropout"') as error:
            node(X, True, rngs=rngs)
        assert re.search(note, "".join(error.value.__notes__))


class Sums(nn.Module):
    """Decodes: what it returns depends on what it saw before."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        total = self.variable("cache", "total", jnp.zeros, x.shape)
        total.value += nn.Dense(4)(x)
        return total.value


@pytest.mark.parametrize("form", ["eager", "jit", "scan"])
def test_a_cache_moves_step_by_step(form: str) -> None:
    model = Host(Sums(), Sums().init(KEYS, X))
    module, variables = nnx_bridge.unhost(model)
    inputs = normal(3, *X.shape)
    expected = []
    for x in inputs:
        y, updates = module.apply(variables, x, mutable=["cache"])
        variables = {**variables, **updates}
        expected.append(y)
    if form == "scan":
        axes: Any = {"in_axes": (nnx.Carry, 0), "out_axes": (nnx.Carry, 0)}
        _, outputs = nnx.scan(lambda model, x: (model, model(x)), **axes)(model, inputs)
    else:
        call = nnx.jit(lambda model, x: model(x)) if form == "jit" else Host.__call__
        outputs = jnp.stack([call(model, x) for x in inputs])
    assert_trees_close(outputs, jnp.stack(expected))
    assert_trees_close(nnx_bridge.unhost(model)[1], variables)

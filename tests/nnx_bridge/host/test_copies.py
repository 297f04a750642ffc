"""Hosts, and Linen modules with replacements, that are copied, pickled and sent to others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import cloudpickle
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import nnx_bridge
from nnx_bridge import Host
from tests.helpers import assert_trees_equal
from tests.nnx_bridge.host.models import KEYS, Around, Block, Net, X

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "cloudpickle": lambda x: pickle.loads(cloudpickle.dumps(x)),
}
each_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


class Counts(nn.Module):
    """Has collections of its own, with names that are not Python's."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        calls = self.variable("how.often", "calls", jnp.zeros, ())
        calls.value += 1
        last = self.variable("__last/input", "x", jnp.zeros, x.shape)
        last.value = x
        return x * calls.value


def migrated() -> Host:
    model = Host.init(Net(), KEYS, X)
    model.layers_0 = Block(nnx.Rngs(3))
    model.encoder = Around(model.encoder)
    return model


@each_copy
@pytest.mark.parametrize("make", [lambda: Host.init(Counts(), KEYS, X), migrated])
def test_a_host(copied: Callable[[Any], Any], make: Callable[[], Host]) -> None:
    model = make()
    other = copied(model)
    assert type(other) is type(model)
    assert nnx.graphdef(other) == nnx.graphdef(model)
    assert_trees_equal(other(X, rngs=KEYS), model(X, rngs=KEYS))
    assert_trees_equal(nnx_bridge.unhost(other)[1], nnx_bridge.unhost(model)[1])


@each_copy
def test_a_linen_module_with_replacements(copied: Callable[[Any], Any]) -> None:
    module, variables = nnx_bridge.unhost(migrated())
    other = copied(module)
    assert isinstance(other, Net) and other == other.clone()
    run = {"rngs": KEYS, "mutable": [name for name in variables if name != "params"]}
    assert_trees_equal(
        other.apply(variables, X, True, **run), module.apply(variables, X, True, **run)
    )
    assert_trees_equal(other.init(KEYS, X), module.init(KEYS, X))


@each_copy
def test_what_is_migrated_step_by_step(copied: Callable[[Any], Any]) -> None:
    again = Host(*nnx_bridge.unhost(migrated()), X, rngs=KEYS)
    again.layers_1 = nnx.Linear(4, 4, rngs=nnx.Rngs(4))
    expected = again(X, rngs=KEYS)
    module, variables = nnx_bridge.unhost(again)
    assert not jnp.array_equal(expected, Net().apply(Net().init(KEYS, X), X))
    other, other_module = copied((again, module))
    assert_trees_equal(other(X, rngs=KEYS), again(X, rngs=KEYS))
    mutable = [name for name in variables if name != "params"]
    y, _ = other_module.apply(variables, X, rngs=KEYS, mutable=mutable)
    assert_trees_equal(y, module.apply(variables, X, rngs=KEYS, mutable=mutable)[0])


def test_a_copy_in_memory_is_equal() -> None:
    module, _ = nnx_bridge.unhost(migrated())
    assert copy.deepcopy(module) == copy.copy(module) == module


def test_classes_that_nobody_can_import_are_sent_along() -> None:
    class Local(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(4)(Counts()(x))

    model = Host.init(Local(), KEYS, X)
    model.Dense_0 = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    module, variables = nnx_bridge.unhost(model)
    other_model, other = pickle.loads(cloudpickle.dumps((model, module)))
    assert_trees_equal(other_model(X), model(X))
    mutable = ["how.often", "__last/input"]
    expected = module.apply(variables, X, mutable=mutable)
    assert_trees_equal(other.apply(variables, X, mutable=mutable), expected)


def test_a_collection_that_the_reader_has_not_seen() -> None:
    kind = nnx_bridge.variable_type("seen here")
    sent = pickle.dumps(kind).replace(b"seen%20here", b"seen%20ther")
    assert nnx_bridge.collection_name(pickle.loads(sent)) == "seen ther"
    assert pickle.loads(pickle.dumps(kind)) is kind

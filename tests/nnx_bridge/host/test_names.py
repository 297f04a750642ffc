"""Names of Linen that NNX modules need themselves: changed in attributes, nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx

import nnx_bridge
from nnx_bridge import Host
from nnx_bridge._names import RESERVED, attribute_name, linen_name
from nnx_bridge.equivalence._correspondence import Paths
from nnx_bridge.host._node import Node
from tests.helpers import assert_trees_equal, randomized, total
from tests.nnx_bridge.host.models import KEYS, X

TX = optax.adam(1e-2)


class Clashing(nn.Module):
    """Submodules, parameters and statistics with clashing names, two of them beside each other."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for name in ("train", "train_", "_linen", "sow__", "_kind", "__call__"):
            x = nn.Dense(4, name=name)(x)
        scale = self.param("perturb", nn.initializers.ones, (4,))
        mean = self.variable("batch_stats", "perturb_", jnp.zeros, 4)
        other = self.variable("cache", "perturb", jnp.zeros, 4)
        return scale * x + mean.value + other.value


class Deep(nn.Module):
    """Such names at depth."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Clashing(name="eval")(nn.Dense(4, name="rngs")(x))
        return nn.Dense(4, name="module")(Clashing(name="_linen_rngs")(x))


def variables(module: nn.Module) -> Any:
    return randomized(module.init(KEYS, X))


def emptied(module: nn.Module) -> Host:
    return Host(module, jax.tree.map(jnp.zeros_like, module.init(KEYS, X)), rngs=KEYS)


def train_state(of: Any) -> dict[str, Any]:
    """A Linen train state with moments that differ from zero."""
    params = of["params"]
    _, moments = TX.update(params, TX.init(params), params)
    return {**of, "opt_state": moments, "step": 3}


def test_an_attribute_says_its_name_in_linen() -> None:
    names = [name + "_" * n for name in (*RESERVED, "if", "__x", "_pytree__y") for n in range(4)]
    attributes = list(map(attribute_name, names))
    assert [linen_name(attribute) for attribute in attributes] == names
    assert RESERVED.isdisjoint(attributes)


def test_every_attribute_of_a_node_is_known() -> None:
    assert {name for name in dir(Node) if not name.startswith("__")} <= RESERVED


@pytest.mark.parametrize("module", [Clashing(), Deep()])
def test_the_state_of_a_host_has_linens_names_in_linen(module: nn.Module) -> None:
    expected = variables(module)
    model = Host(module, expected)
    assert_trees_equal(nnx_bridge.to_variables(nnx.state(model)), expected)
    assert_trees_equal(nnx_bridge.unhost(model)[1], expected)


def test_linens_variables_are_a_state_of_the_host() -> None:
    expected = variables(Deep())
    model = emptied(Deep())
    nnx.update(model, nnx_bridge.to_state(expected))
    assert_trees_equal(nnx_bridge.unhost(model)[1], expected)
    again = nnx_bridge.to_state(nnx_bridge.to_variables(nnx.state(model)))
    assert _paths(again) == _paths(nnx.state(model))


def _paths(state: nnx.State) -> set[Any]:
    return {path for path, _ in nnx.to_flat_state(state)}


def test_two_collections_of_one_clashing_name() -> None:
    model = Host(Clashing(), variables(Clashing()))
    assert isinstance(model.perturb_, nnx.Param)
    assert model.cache_perturb.shape == model.perturb__.shape == (4,)


def test_what_replaces_a_submodule_has_its_name_in_linen() -> None:
    model = emptied(Deep())
    model.eval_.train_ = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    of_state = nnx_bridge.to_variables(nnx.state(model, nnx.Param))["params"]
    _, of_module = nnx_bridge.unhost(model)
    assert_trees_equal(of_state, of_module["params"])
    assert of_state["eval"]["train"]["kernel"].any()


def test_a_host_is_filled_from_linens_variables() -> None:
    expected, model = variables(Deep()), emptied(Deep())
    nnx_bridge.load(model, expected)
    assert_trees_equal(nnx_bridge.to_variables(nnx.state(model, nnx.Not(nnx.RngState))), expected)


def test_names_that_differ_by_an_underscore_are_compared_apart() -> None:
    expected = variables(Clashing())
    pairs = Paths(expected, nnx_bridge.to_variables(nnx.state(Host(Clashing(), expected))))
    assert pairs.problems == []
    assert_trees_equal(pairs.to_model(expected), expected)
    assert (pairs.module("train"), pairs.module("train_")) == ("train", "train_")


def test_a_capture_finds_the_nodes_of_clashing_names() -> None:
    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return self.perturb("train", nn.Dense(4)(x))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return Sows(name="sow")(x)

    model = Host.init(Outer(), KEYS, X)
    before = {path for path, _ in nnx.iter_modules(model)}
    grads = nnx_bridge.capture_grad(total, model, X).intermediate_grads
    assert grads["sow_"]["train"].get_value().any()
    assert {path for path, _ in nnx.iter_modules(model)} == before


def test_a_train_state_goes_into_a_host_and_back() -> None:
    expected, model = train_state(variables(Deep())), emptied(Deep())
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    assert nnx_bridge.from_train_state(expected, model, optimizer) == {}
    moments = optimizer.opt_state[0].mu["eval_"]["train__"]["kernel"].get_value()
    assert_trees_equal(moments, expected["opt_state"][0].mu["eval"]["train_"]["kernel"])
    assert_trees_equal(nnx_bridge.to_train_state(model, optimizer, expected), expected)


def test_a_checkpoint_goes_into_a_host_and_back(tmp_path: Path) -> None:
    expected, model = train_state(variables(Deep())), emptied(Deep())
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "linen", expected)
    nnx_bridge.convert(tmp_path / "linen", tmp_path / "nnx")
    for source in ("linen", "nnx"):
        nnx_bridge.load_checkpoint(tmp_path / source, model, optimizer)
        assert_trees_equal(nnx_bridge.to_train_state(model, optimizer, expected), expected)
    nnx_bridge.convert(tmp_path / "nnx", tmp_path / "back")
    with ocp.StandardCheckpointer() as checkpointer:
        assert_trees_equal(
            checkpointer.restore(tmp_path / "back"), checkpointer.restore(tmp_path / "linen")
        )


def test_a_checkpoint_that_does_not_remember_linen_gets_linens_names(tmp_path: Path) -> None:
    model = emptied(Clashing())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nnx", nnx.state(model, nnx.Param))
    nnx_bridge.convert(tmp_path / "nnx", tmp_path / "linen")
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "linen")
    assert found["params"].keys() == nnx_bridge.unhost(model)[1]["params"].keys()


def test_a_native_module_may_have_such_a_name_itself(tmp_path: Path) -> None:
    class Native(nnx.Module):
        def __init__(self) -> None:
            self.heads = nnx.Dict(train=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))

    kernel, bias = np.ones((2, 2), np.float32), np.ones(2, np.float32)
    expected = {"params": {"heads": {"train": {"kernel": kernel, "bias": bias}}}}
    model = Native()
    nnx_bridge.from_train_state(expected, model)
    assert model.heads.train.kernel[...].all()
    back = nnx_bridge.to_train_state(model, None, expected)
    assert_trees_equal(back, jax.tree.map(jnp.asarray, expected))
    nnx_bridge.load(model, jax.tree.map(jnp.zeros_like, expected))
    assert not model.heads.train.kernel[...].any()

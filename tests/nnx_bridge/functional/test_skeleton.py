"""Graphs of NNX objects are copied with what is shared in them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lifted
from nnx_bridge.functional._skeleton import Graph, Tree, take_apart
from tests.nnx_bridge import models


class NoPytree(nnx.Module, pytree=False):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 2, rngs=rngs)


class SharesWithoutVariables(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = self.second = nnx.Dropout(0.0)
        self.dense = nnx.Linear(3, 2, rngs=rngs)


class SharesOneVariable(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.tied = self.dense.kernel


@pytest.mark.parametrize(
    ("kind", "skeleton"),
    [
        (models.MLP, Tree),
        (models.Containers, Tree),
        (models.Noisy, Tree),
        (models.Shared, Graph),
        (models.Cyclic, Graph),
        (SharesWithoutVariables, Graph),
        (SharesOneVariable, Graph),
        (NoPytree, Graph),
    ],
)
def test_a_copy_has_the_graph_of_the_original(kind: Any, skeleton: type) -> None:
    mdl = models.make(kind)
    found, paths, leaves, nodes = take_apart((mdl,))
    assert type(found) is skeleton
    (copy,), copied_nodes = found.copy(leaves)
    assert nnx.graphdef(copy) == nnx.graphdef(mdl)
    assert list(map(type, copied_nodes)) == list(map(type, nodes))
    of_graph = nnx.to_flat_state(nnx.state((mdl,)))
    assert {path: id(leaf) for path, leaf in zip(paths, leaves, strict=True)} == {
        tuple(path): id(leaf) for path, leaf in of_graph
    }


def test_a_copy_shares_what_is_shared() -> None:
    mdl = models.make(SharesWithoutVariables)
    skeleton, _, leaves, _ = take_apart((mdl,))
    (copy,), _ = skeleton.copy(leaves)
    assert copy.first is copy.second


def test_an_attribute_that_is_set_on_a_shared_module() -> None:
    def call(mdl: Any, x: jax.Array) -> jax.Array:
        mdl.first.rate = 1.0
        return x * (1 - mdl.second.rate)

    mdl = models.make(SharesWithoutVariables)
    y, _ = lifted.vjp(call, mdl, jnp.ones(3))
    assert y.tolist() == [0.0, 0.0, 0.0]
    assert (mdl.first.rate, mdl.first) == (1.0, mdl.second)


@pytest.mark.parametrize("kind", [models.MLP, models.Shared])
def test_skeletons_of_equal_modules_are_equal(kind: Any) -> None:
    first, second = (take_apart(models.make(kind))[0] for _ in range(2))
    assert (first, hash(first)) == (second, hash(second))
    assert first != take_apart(models.make(models.Norm))[0]

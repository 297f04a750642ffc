"""A Linen model and its NNX twin, the same code with another import, agree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from flax.core import DenyList
from hypothesis import given, settings
from hypothesis import strategies as st

import lifted
import nnx_bridge
from tests.helpers import assert_trees_close, assert_trees_equal, normal, strict
from tests.nnx_bridge.transforms.twins import (
    LinenBlock,
    LinenDraws,
    LinenGradient,
    NNXBlock,
    NNXGradient,
    collections,
    linen_gradient,
    linen_tangent,
    nnx_draws,
    nnx_gradient,
    nnx_tangent,
    pair,
)

X = normal(2, 3)

# These compile several programs for each example.
few = settings(max_examples=settings().max_examples // 2)
fewer = settings(max_examples=settings().max_examples // 4)


def agree(
    lift: Any,
    x: jax.Array = X,
    *args: Any,
    sown: bool = True,
    carried: bool = False,
    blocks: Any = (LinenBlock, NNXBlock),
    outer: str = "grad",
) -> None:
    """Variables, outputs, writes, sown values and derivatives of a lifted class are equal.

    Linen cannot create what a loop carries, so with ``carried`` the variables are those of NNX.
    """
    module, mdl = lift(linen, blocks[0])(), lift(nnx_bridge, blocks[1])(nnx.Rngs(0))
    created = collections(mdl)
    variables = created
    if not carried:
        variables, mdl = pair(module, mdl, x, *args)
    assert jax.tree.map(jnp.shape, created) == jax.tree.map(jnp.shape, variables)
    of_nnx, of_linen = (
        (nnx_gradient, linen_gradient) if outer == "grad" else (nnx_tangent, linen_tangent)
    )
    assert_trees_close(of_nnx(nnx.clone(mdl), x, *args), of_linen(module, variables, x, *args))

    y, updates = module.apply(variables, x, *args, mutable=["batch_stats", "intermediates"])
    with strict():
        out, recorded = nnx_bridge.capture(mdl, nnx.Intermediate)(x, *args)
    assert_trees_close(out, y)
    assert_trees_close(collections(mdl)["batch_stats"], updates["batch_stats"])
    intermediates = nnx_bridge.to_variables(recorded).get("intermediates", {})
    assert_trees_close(intermediates, updates.get("intermediates", {}))
    assert bool(intermediates) == sown


@few
@given(
    filter=st.sampled_from(["params", ("params",), ("other", "params"), "rest"]),
    params=st.sampled_from([0, 1, -1]),
    stats=st.sampled_from([0, 1, -1, "carry"]),
    length=st.integers(1, 3),
    reverse=st.booleans(),
    unroll=st.sampled_from([1, 2]),
    sown=st.booleans(),
    remat=st.booleans(),
)
def test_scan(
    filter: Any, params: int, stats: Any, sown: bool, remat: bool, **options: Any
) -> None:
    axes: dict[Any, int] = {}
    if stats == "carry":
        options["variable_carry"] = "batch_stats"
    else:
        axes["batch_stats"] = stats
    if sown:
        axes["intermediates"] = 0
    others = DenyList(("batch_stats", "intermediates"))
    axes[others if filter == "rest" else filter] = params

    def lift(nn: Any, block: Any) -> Any:
        block = nn.remat(block, prevent_cse=False) if remat else block
        return nn.scan(block, variable_axes=axes, split_rngs={"params": True}, **options)

    agree(lift, sown=sown, carried=stats == "carry")


@few
@given(
    params=st.sampled_from([0, 1, -1, None]),
    stats=st.sampled_from([0, 1]),
    in_axis=st.sampled_from([0, 1, 2]),
    out_axis=st.sampled_from([0, 1, -1]),
    size=st.integers(1, 3),
    sown=st.booleans(),
)
def test_vmap(params: Any, stats: int, in_axis: int, out_axis: int, size: int, sown: bool) -> None:
    axes = {"params": params, "batch_stats": stats} | ({"intermediates": 1} if sown else {})
    shape = [2, 3]
    shape.insert(in_axis, size)

    def lift(nn: Any, block: Any) -> Any:
        return nn.vmap(
            block,
            variable_axes=axes,
            split_rngs={"params": params is not None},
            in_axes=(in_axis,),
            out_axes=(out_axis, 0),
            axis_size=size,
        )

    agree(lift, normal(*shape), sown=sown)


@fewer
@given(
    order=st.permutations(["scan", "vmap", "remat"]),
    axes=st.tuples(st.sampled_from([0, 1, -1]), st.sampled_from([0, 1, -1])),
    blocks=st.sampled_from([(LinenBlock, NNXBlock), (LinenGradient, NNXGradient)]),
    outer=st.sampled_from(["grad", "jvp"]),
)
def test_nestings(order: list[str], axes: tuple[int, int], blocks: Any, outer: str) -> None:
    of_scan, of_vmap = ({"params": axis, "batch_stats": axis, "intermediates": 0} for axis in axes)
    options = {
        "scan": {"variable_axes": of_scan, "split_rngs": {"params": True}, "length": 2},
        "vmap": {"variable_axes": of_vmap, "split_rngs": {"params": True}, "axis_size": 3},
        "remat": {},
    }

    def lift(nn: Any, block: Any) -> Any:
        for name in order:
            block = getattr(nn, name)(block, **options[name])
        return block

    agree(lift, normal(3, 2, 3), blocks=blocks, outer=outer)


def test_remat_scan() -> None:
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.tanh(linen.Dense(3)(x))

    class NNX(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.Dense_0 = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.tanh(self.Dense_0(x))

    module = linen.remat_scan(Linen, lengths=(2, 3))()
    mdl = nnx_bridge.remat_scan(NNX, lengths=(2, 3))(nnx.Rngs(0))
    variables, mdl = pair(module, mdl, X)
    assert_trees_close(mdl(X), module.apply(variables, X))
    assert_trees_close(nnx_gradient(mdl, X), linen_gradient(module, variables, X))


@pytest.mark.parametrize("transform", ["scan", "vmap"])
@pytest.mark.parametrize("split", [True, False])
def test_streams_have_linens_keys(transform: str, split: bool) -> None:
    key = jax.random.key(3)
    if transform == "scan":
        options = {"split_rngs": {"params": split}, "length": 4}
        args: Any = (0.0, None)
    else:
        options = {"split_rngs": {"params": split}, "axis_size": 4, "in_axes": None}
        args = (0.0,)
    module = getattr(linen, transform)(LinenDraws, **options)()
    _, wanted = module.apply({}, *args, rngs={"params": key})
    _, drawn = getattr(nnx_bridge, transform)(nnx_draws, **options)(nnx.Rngs(params=key), *args)
    assert_trees_equal(drawn, wanted)


def test_nested_streams_have_linens_keys() -> None:
    key = jax.random.key(3)

    def lift(nn: Any, target: Any) -> Any:
        target = nn.vmap(
            target, split_rngs={"params": True}, axis_size=2, in_axes=None, out_axes=(None, 0)
        )
        return nn.scan(target, split_rngs={"params": True}, length=3)

    _, wanted = lift(linen, LinenDraws)().apply({}, 0.0, None, rngs={"params": key})
    _, drawn = lift(nnx_bridge, nnx_draws)(nnx.Rngs(params=key), 0.0, None)
    assert_trees_equal(drawn, wanted)


def test_lifted_derivatives_outside_and_inside_of_a_loop() -> None:
    """google/flax #4771, with the derivative on either side."""
    split = {"params": True}
    axes = {"params": 0, "batch_stats": 0}

    def through(mdl: Any, x: jax.Array, scale: Any = None) -> Any:
        y, tangent = lifted.jvp(lambda mdl, x: mdl(x)[0], mdl, (x,), (jnp.ones_like(x),), {})
        return y + tangent, None

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> Any:
            layers = linen.scan(through, variable_axes=axes, split_rngs=split, length=2)
            return layers(LinenBlock(name="block"), x, None)[0]

    class NNX(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.block = nnx.split_rngs(splits=2)(nnx.vmap(NNXBlock))(rngs)

        def __call__(self, x: jax.Array) -> Any:
            layers = nnx_bridge.scan(through, variable_axes=axes, split_rngs=split, length=2)
            return layers(self.block, x, None)[0]

    module = Linen()
    variables, mdl = pair(module, NNX(nnx.Rngs(0)), X)
    assert_trees_close(mdl(X), module.apply(variables, X, mutable=["batch_stats"])[0])

"""Stacks of layers on one side, lists of layers on the other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from nnx_bridge import WeightsError, load, match
from nnx_bridge.weights import Transpose
from tests.helpers import KEY, assert_trees_close, assert_trees_equal, normal, randomized
from tests.nnx_bridge.weights.builders import Holder, dense, partners, variables

X = normal(2, 4)


class Block(nn.Module):
    width: int = 5
    boxed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> Any:
        init = nn.initializers.lecun_normal()
        if self.boxed:
            init = nn.with_partitioning(init, ("embed", "mlp"))
        y = nn.Dense(self.width, kernel_init=init)(x)
        return x + nn.Dense(4)(jnp.tanh(y)), None


class Scanned(nn.Module):
    axis: int = 0
    layers: int = 3
    width: int = 5
    boxed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stack = nn.scan(
            Block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=self.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(self.width, self.boxed, name="layers")(x, None)[0]


class Unrolled(nn.Module):
    layers: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x, _ = Block(name=f"layers_{i}")(x)
        return x


class NativeBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = 5) -> None:
        self.up = nnx.Linear(4, width, rngs=rngs)
        self.down = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jnp.tanh(self.up(x)))


class NativeList(nnx.Module):
    def __init__(self, layers: int = 3, width: int = 5) -> None:
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([NativeBlock(rngs, width) for _ in range(layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


class NativeStack(nnx.Module):
    def __init__(self, axis: int = 0, layers: int = 3) -> None:
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=axis)
        def make(rngs: nnx.Rngs) -> NativeBlock:
            return NativeBlock(rngs)

        self.axis = axis
        self.blocks = make(nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(self.axis, nnx.Carry), out_axes=nnx.Carry)
        def run(block: NativeBlock, x: jax.Array) -> jax.Array:
            return block(x)

        return run(self.blocks, x)


def _named(*names: str) -> nnx.Param[Any]:
    return nnx.Param(jnp.zeros((4, 4)), out_sharding=names, eager_sharding=False)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_scan_of_linen_fills_a_list(axis: int) -> None:
    linen, model = Scanned(axis), NativeList()
    weights = randomized(linen.init(KEY, X))
    plan = load(model, weights)
    assert_trees_close(model(X), linen.apply(weights, X))
    assert {row.layout.linen_axis for row in plan.rows} == {axis}
    assert_trees_equal(plan.to_linen(model), weights)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_list_of_linen_fills_a_stack(axis: int) -> None:
    linen, model = Unrolled(), NativeStack(axis)
    weights = randomized(linen.init(KEY, X))
    plan = load(model, weights)
    assert_trees_close(model(X), linen.apply(weights, X))
    assert {row.layout.nnx_axis for row in plan.rows} == {axis}
    assert_trees_equal(plan.to_linen(model), weights)


def test_stacks_on_both_sides_are_copied() -> None:
    linen, model = Scanned(), NativeStack()
    weights = randomized(linen.init(KEY, X))
    plan = load(model, weights)
    assert_trees_close(model(X), linen.apply(weights, X))
    assert {str(row.layout) for row in plan.rows} == {""}


def test_a_stack_along_another_axis_than_that_of_the_model_is_an_error() -> None:
    weights = Scanned(1).init(KEY, X)
    problems = match(weights, NativeStack(0)).problems
    assert problems
    assert all(p.kind.value in ("missing", "extra", "shape") for p in problems)


def test_an_axis_that_the_shapes_do_not_tell_is_asked_for() -> None:
    linen, model = Scanned(layers=4, width=4), NativeList(layers=4, width=4)
    weights = randomized(linen.init(KEY, X))
    rules = [("layers/Dense_0", "blocks/up"), ("layers/Dense_1", "blocks/down")]
    (problem,) = match(weights, model, rules).problems
    assert "blocks is a stack on one side, and a list on the other" in problem.text
    assert "the shapes fit the axes (0, 1): say which with stack_axis={'blocks': 0}" in problem.text
    with pytest.raises(WeightsError, match="say which with stack_axis"):
        load(model, weights, rules)
    load(model, weights, rules, stack_axis={"blocks": 0})
    assert_trees_close(model(X), linen.apply(weights, X))


def test_the_wrong_axis_is_found_by_the_call_that_follows() -> None:
    linen, model = Scanned(layers=4, width=4), NativeList(layers=4, width=4)
    weights = randomized(linen.init(KEY, X))
    before = nnx.clone(model)
    calls = (lambda v: linen.apply(v, X), lambda m: m(X))
    with pytest.raises(WeightsError, match=r"outputs differ with these weights"):
        load(model, weights, stack_axis=1, calls=calls)
    assert_trees_equal(nnx.state(model), nnx.state(before))
    load(model, weights, stack_axis=0, calls=calls)


def test_the_names_of_axes_tell_the_axis() -> None:
    model = Holder(blocks=nnx.List([_named("embed", "mlp") for _ in range(4)]))
    box = nn.Partitioned(normal(4, 4, 4), ("embed", "layers", "mlp"))
    plan = match({"params": {"blocks": box}}, model)
    assert not plan.problems
    assert plan.rows[0].layout.linen_axis == 1


def test_a_rule_leads_from_a_list_into_a_stack() -> None:
    linen = variables({f"params/{n}_{i}/kernel": (4, 5) for n in "ab" for i in range(3)})
    x, y = (Holder(kernel=nnx.Param(jnp.zeros((3, 4, 5)))) for _ in "xy")
    found = partners(match(linen, Holder(x=x, y=y), [("a_*", "y/*")]))
    a, b = (" + ".join(f"params/{n}_{i}/kernel" for i in range(3)) for n in "ab")
    assert found == {a: "y/kernel (stack on axis 0)", b: "x/kernel (stack on axis 0)"}


def test_the_name_of_a_stacks_axis_goes_and_comes_with_it() -> None:
    linen, model = Scanned(1, boxed=True), NativeList()
    weights = randomized(linen.init(KEY, X))
    assert weights["params"]["layers"]["Dense_0"]["kernel"].names == ("embed", "layers", "mlp")
    plan = load(model, weights, axis_names=True)
    assert model.blocks[2].up.kernel.out_sharding == ("embed", "mlp")
    assert_trees_equal(plan.to_linen(model), weights)


def test_the_names_of_a_list_get_an_unnamed_axis_in_a_stack() -> None:
    weights = {
        "params": {
            f"layers_{i}": {"kernel": nn.Partitioned(normal(4, 5, seed=i), ("embed", "mlp"))}
            for i in range(3)
        }
    }
    model = Holder(layers=Holder(kernel=nnx.Param(jnp.zeros((3, 4, 5)))))
    plan = load(model, weights, axis_names=True)
    assert model.layers.kernel.out_sharding == (None, "embed", "mlp")
    assert_trees_equal(plan.to_linen(model), weights)


def test_the_names_of_axes_follow_the_layout_of_a_rule() -> None:
    weights = {"params": {"w": nn.Partitioned(normal(4, 5), ("embed", "mlp"))}}
    model = Holder(w=nnx.Param(jnp.zeros((5, 4))))
    plan = load(model, weights, [("w", "w", Transpose())], axis_names=True)
    assert model.w.out_sharding == ("mlp", "embed")
    assert_trees_equal(plan.to_linen(model), weights)


def test_a_model_with_names_of_its_own_keeps_them() -> None:
    weights = {"params": {"w": nn.Partitioned(normal(4, 4), ("embed", "mlp"))}}
    model = Holder(w=_named("data", "model"))
    plan = load(model, weights, axis_names=True)
    assert model.w.out_sharding == ("data", "model")
    assert_trees_equal(plan.to_linen(model), weights)


def test_axes_that_are_named_in_another_order_are_an_error() -> None:
    weights = {"params": {"w": nn.Partitioned(normal(4, 4), ("embed", "mlp"))}}
    model = Holder(w=_named("mlp", "embed"))
    (problem,) = match(weights, model).problems
    assert problem.text.startswith(
        "w: the axes are ('mlp', 'embed') in the model and ('embed', 'mlp') in Linen"
    )


def test_gates_in_a_stack_are_fused_layer_by_layer() -> None:
    class Cells(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            stack = nn.vmap(
                nn.RNN, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0
            )
            return stack(nn.OptimizedLSTMCell(4), name="rnn")(x)

    x = normal(2, 3, 5, 4)
    weights = randomized(Cells().init(KEY, x))
    rngs = nnx.Rngs(0)
    cells = [nnx.RNN(nnx.OptimizedLSTMCell(4, 4, rngs=rngs), rngs=rngs) for _ in range(2)]
    model = Holder(rnn=nnx.List(cells))
    plan = match(weights, model, stack_axis=0)
    assert not plan.problems, plan.problems[0].text
    assert {str(row.layout) for row in plan.rows} == {"unstack axis 0, concatenate 4 along -1"}
    load(model, weights, stack_axis=0)
    y = Cells().apply(weights, x)
    assert_trees_close(jnp.stack([model.rnn[i](x[i]) for i in range(2)]), y)
    assert_trees_equal(plan.to_linen(model), weights)


def test_only_the_stacked_list_is_taken_for_a_stack() -> None:
    linen = variables(
        {
            "params/scanned/kernel": (3, 4, 5),
            "params/layers_0/kernel": (4, 5),
            "params/layers_1/kernel": (4, 5),
        }
    )
    model = Holder(
        scanned=nnx.List([dense(4, 5, use_bias=False) for _ in range(3)]),
        layers=nnx.List([dense(4, 5, use_bias=False) for _ in range(2)]),
    )
    assert partners(match(linen, model)) == {
        "params/scanned/kernel": "scanned/0/kernel + scanned/1/kernel + scanned/2/kernel "
        "(unstack axis 0)",
        "params/layers_0/kernel": "layers/0/kernel",
        "params/layers_1/kernel": "layers/1/kernel",
    }


def test_a_stack_of_another_length_is_an_error() -> None:
    linen = variables({"params/blocks/kernel": (4, 4, 5)})
    model = Holder(blocks=nnx.List([dense(4, 5, use_bias=False) for _ in range(3)]))
    assert {p.kind.value for p in match(linen, model).problems} == {"missing", "extra"}


def test_numpy_stacks_stay_in_numpy() -> None:
    linen = jax.tree.map(np.asarray, variables({"params/blocks/kernel": (3, 4, 5)}))
    model = Holder(blocks=nnx.List([dense(4, 5, use_bias=False) for _ in range(3)]))
    converted = match(linen, model).to_nnx(linen)
    assert isinstance(converted["blocks"][0]["kernel"], np.ndarray)

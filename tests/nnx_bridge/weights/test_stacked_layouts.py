"""Stacks and lists whose layers lie otherwise on the other side, and stacks of stacks.

Nothing is run here: what a plan makes of layers together must be what it makes of each alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from nnx_bridge.weights import Plan, Stacked, load, match
from tests.helpers import assert_trees_equal
from tests.nnx_bridge.weights.builders import Holder, Linear

Tree = dict[str, Any]
_RNGS = nnx.Rngs(0)


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> Tree:
    """Parameters of one layer by dotted names."""
    generator = np.random.default_rng(seed)
    tree: Tree = {}
    for path, shape in shapes.items():
        module, name = path.split(".")
        values = generator.normal(size=shape).astype(np.float32)
        tree.setdefault(module, {})[name] = values
    return tree


def heads() -> nnx.Module:
    """Its projections are `DenseGeneral` in Linen; its norm lies alike."""
    return Holder(
        norm=nnx.LayerNorm(4, rngs=_RNGS),
        query=nnx.Linear(4, 6, rngs=_RNGS),
        out=nnx.Linear(6, 4, rngs=_RNGS),
    )


HEADS = {
    "norm.scale": (4,),
    "norm.bias": (4,),
    "query.kernel": (4, 2, 3),
    "query.bias": (2, 3),
    "out.kernel": (2, 3, 4),
    "out.bias": (4,),
}


def turned() -> nnx.Module:
    """Layers of the user's own, whose kernels lie turned around."""
    return Holder(up=Linear(4, 5), down=Linear(5, 4))


TURNED = {"up.kernel": (4, 5), "up.bias": (5,), "down.kernel": (5, 4), "down.bias": (4,)}


def gates() -> nnx.Module:
    """One array for all gates."""
    return Holder(cell=nnx.OptimizedLSTMCell(6, 5, rngs=_RNGS))


GATES = {f"i{gate}.kernel": (6, 5) for gate in "ifgo"}
GATES |= {f"h{gate}.kernel": (5, 5) for gate in "ifgo"} | {f"h{gate}.bias": (5,) for gate in "ifgo"}


def plain() -> nnx.Module:
    """Lies alike on both sides."""
    return Holder(up=nnx.Linear(4, 5, rngs=_RNGS))


PLAIN = {"up.kernel": (4, 5), "up.bias": (5,)}
MERGED = [((4, 2, 3), (4, 6)), ((2, 3), (6,)), ((2, 3, 4), (6, 4))]
LAYOUTS = {
    heads: {"", *(f"reshape {a} to {b}" for a, b in MERGED)},
    turned: {"", "transpose (1, 0)"},
    gates: {"concatenate 4 along -1"},
    plain: {""},
}
Native = Callable[[], nnx.Module]
PAIRS = pytest.mark.parametrize(
    ("shapes", "native"), [(HEADS, heads), (TURNED, turned), (GATES, gates), (PLAIN, plain)]
)
AXES = pytest.mark.parametrize("axis", [0, 1, -1])


def layers_of(shapes: Any, native: Native, counts: tuple[int, ...]) -> list[Tree]:
    """Linen parameters of each layer."""
    layers = [drawn(shapes, seed) for seed in range(int(np.prod(counts)))]
    return [{"cell": layer} if native is gates else layer for layer in layers]


def stacked(layers: list[Any], counts: tuple[int, ...], axis: int) -> Any:
    """A stack of all layers; of stacks, where there are several counts."""
    if not counts:
        return layers[0]
    width = len(layers) // counts[0]
    inner = [
        stacked(layers[i * width : (i + 1) * width], counts[1:], axis) for i in range(counts[0])
    ]
    return jax.tree.map(lambda *xs: np.stack(xs, axis), *inner)


def lists(layers: list[Any], counts: tuple[int, ...], name: str) -> Tree:
    """Linen's lists of layers: `layers_0`, and in it `inner_0`."""
    width = len(layers) // counts[0]
    below = counts[1:]
    return {
        f"{name}_{i}": lists(part, below, "inner") if below else part[0]
        for i, part in enumerate(layers[i * width : (i + 1) * width] for i in range(counts[0]))
    }


def native_lists(native: Native, counts: tuple[int, ...]) -> Any:
    below = counts[1:]
    return nnx.List(
        [Holder(inner=native_lists(native, below)) if below else native() for _ in range(counts[0])]
    )


def native_stack(native: Native, counts: tuple[int, ...], axis: int) -> nnx.Module:
    """What `nnx.vmap(native, out_axes=axis)` makes."""
    layer = native()
    count = int(np.prod(counts))
    nnx.update(
        layer,
        jax.tree.map(lambda x: stacked([np.zeros_like(x)] * count, counts, axis), nnx.state(layer)),
    )
    return layer


def one_by_one(layers: list[Tree], native: Native) -> list[Any]:
    """Each layer converted alone, as other tests have it."""
    plan = match({"params": layers[0]}, native())
    assert {str(row.layout) for row in plan.rows} == LAYOUTS[native]
    return [plan.to_nnx({"params": layer}) for layer in layers]


def checked(plan: Plan, params: Tree, expected: Any) -> None:
    """The plan is complete, gives what is expected, and leads back."""
    plan.check()
    converted = plan.to_nnx({"params": params})
    assert_trees_equal(jax.tree.map(np.asarray, converted), jax.tree.map(np.asarray, expected))
    assert_trees_equal(plan.to_linen(converted), {"params": params})
    assert Plan.from_json(plan.to_json()) == plan


@PAIRS
@AXES
def test_a_stack_fills_a_list_whose_layers_lie_otherwise(
    shapes: Any, native: Native, axis: int
) -> None:
    layers = layers_of(shapes, native, (3,))
    params = {"layers": stacked(layers, (3,), axis)}
    plan = match({"params": params}, Holder(layers=native_lists(native, (3,))))
    checked(plan, params, {"layers": dict(enumerate(one_by_one(layers, native)))})


@PAIRS
@AXES
def test_a_list_fills_a_stack_whose_layers_lie_otherwise(
    shapes: Any, native: Native, axis: int
) -> None:
    layers = layers_of(shapes, native, (3,))
    params = lists(layers, (3,), "layers")
    plan = match({"params": params}, Holder(layers=native_stack(native, (3,), axis)))
    checked(plan, params, {"layers": stacked(one_by_one(layers, native), (3,), axis)})


@PAIRS
@AXES
def test_a_stack_of_stacks_fills_a_list_of_lists(shapes: Any, native: Native, axis: int) -> None:
    counts = (2, 3)
    layers = layers_of(shapes, native, counts)
    params = {"layers": {"inner": stacked(layers, counts, axis)}}
    plan = match({"params": params}, Holder(layers=native_lists(native, counts)))
    alone = iter(one_by_one(layers, native))
    expected = {i: {"inner": {j: next(alone) for j in range(3)}} for i in range(2)}
    checked(plan, params, {"layers": expected})


@PAIRS
@pytest.mark.parametrize("axis", [0, 1])
def test_a_list_of_lists_fills_a_stack_of_stacks(shapes: Any, native: Native, axis: int) -> None:
    counts = (2, 3)
    layers = layers_of(shapes, native, counts)
    params = lists(layers, counts, "layers")
    model = Holder(layers=Holder(inner=native_stack(native, counts, axis)))
    plan = match({"params": params}, model)
    expected = stacked(one_by_one(layers, native), counts, axis)
    checked(plan, params, {"layers": {"inner": expected}})


def test_what_stands_beside_the_inner_list_is_a_stack_too() -> None:
    layers = layers_of(PLAIN, plain, (2, 3))
    norms = [{"scale": np.full(4, i, np.float32)} for i in range(2)]
    params = {"layers": {"inner": stacked(layers, (2, 3), 0), "norm": stacked(norms, (2,), 0)}}
    block = lambda: Holder(  # noqa: E731
        inner=native_lists(plain, (3,)), norm=nnx.LayerNorm(4, use_bias=False, rngs=_RNGS)
    )
    plan = match({"params": params}, Holder(layers=nnx.List([block() for _ in range(2)])))
    alone = iter(one_by_one(layers, plain))
    expected = {
        i: {"inner": {j: next(alone) for j in range(3)}, "norm": norms[i]} for i in range(2)
    }
    checked(plan, params, {"layers": expected})


def test_a_list_of_stacks_is_taken_apart_stack_by_stack() -> None:
    layers = layers_of(HEADS, heads, (2, 3))
    params = {
        f"layers_{i}": {"inner": stacked(layers[3 * i : 3 * i + 3], (3,), 0)} for i in range(2)
    }
    plan = match({"params": params}, Holder(layers=native_lists(heads, (2, 3))))
    alone = iter(one_by_one(layers, heads))
    expected = {i: {"inner": {j: next(alone) for j in range(3)}} for i in range(2)}
    checked(plan, params, {"layers": expected})


def test_which_axis_of_a_stack_of_stacks_is_the_outer_one_is_asked_for() -> None:
    layers = layers_of(PLAIN, plain, (2, 2))
    params = {"layers": {"inner": stacked(layers, (2, 2), 0)}}
    model = Holder(layers=native_lists(plain, (2, 2)))
    (problem,) = match({"params": params}, model).problems
    assert (
        "layers is a stack on one side, and a list on the other; the shapes fit the axes "
        "((0, 0), (1, 0)): say which with stack_axis={'layers': 0, 'layers/*/inner': 0}"
    ) in problem.text
    for stack_axis in (0, {"layers": 0, "layers/*/inner": 0}):
        alone = iter(one_by_one(layers, plain))
        expected = {i: {"inner": {j: next(alone) for j in range(2)}} for i in range(2)}
        plan = match({"params": params}, model, stack_axis=stack_axis)
        checked(plan, params, {"layers": expected})


def test_a_stack_that_may_be_copied_or_turned_is_asked_for() -> None:
    # Copied along the last axis, or turned around along the first.
    params = {"layers": {"kernel": np.zeros((5, 4, 5), np.float32)}}
    model = Holder(layers=nnx.List([Linear(4, 5) for _ in range(5)]))
    for layer in model.layers:
        del layer.bias
    (problem,) = match({"params": params}, model).problems
    assert "the shapes fit the axes (0, 2): say which with stack_axis" in problem.text
    rows = match({"params": params}, model, stack_axis=0).rows
    assert [str(row.layout) for row in rows] == ["unstack axis 0, transpose (1, 0)"]


def test_square_kernels_in_a_stack_of_transposed_ones_are_an_error() -> None:
    shapes = {"up.kernel": (4, 5), "up.bias": (5,), "mid.kernel": (5, 5), "mid.bias": (5,)}
    params = {"layers": stacked(layers_of(shapes, plain, (3,)), (3,), 0)}
    model = Holder(layers=nnx.List([Holder(up=Linear(4, 5), mid=Linear(5, 5)) for _ in range(3)]))
    (problem,) = match({"params": params}, model).problems
    assert problem.text.startswith("params/layers/mid/kernel: the candidates in NNX are")
    assert "which nobody can see of a square one" in problem.text


def test_a_list_whose_layers_lie_otherwise_is_no_stack_beside_a_larger_array() -> None:
    layers = layers_of(HEADS, heads, (2,))
    params = {**lists(layers, (2,), "layers"), "extra": {"kernel": np.zeros((2, 4, 2, 3), "f4")}}
    model = Holder(layers=native_lists(heads, (2,)))
    plan = match({"params": params}, model, allow_extra=["extra"])
    plan.check()
    assert not any(isinstance(row.layout, Stacked) for row in plan.rows)


def test_three_levels() -> None:
    counts = (2, 3, 2)
    layers = layers_of(PLAIN, plain, counts)
    params = {"layers": {"inner": {"inner": stacked(layers, counts, 0)}}}
    plan = match({"params": params}, Holder(layers=native_lists(plain, counts)), stack_axis=0)
    alone = iter(one_by_one(layers, plain))
    expected = {
        i: {"inner": {j: {"inner": {k: next(alone) for k in range(2)}} for j in range(3)}}
        for i in range(2)
    }
    checked(plan, params, {"layers": expected})


def test_the_names_of_both_axes_go_and_come_with_their_stacks() -> None:
    names = ("outer", "embed", "inner", "mlp")
    box = nn.Partitioned(np.zeros((2, 4, 3, 5), np.float32), names)
    inner = [nnx.List([nnx.Param(jnp.zeros((4, 5))) for _ in range(3)]) for _ in range(2)]
    model = Holder(w=nnx.List(inner))
    plan = load(model, {"params": {"w": box}}, axis_names=True)
    assert str(plan.rows[0].layout) == "unstack axis 0, unstack axis 1"
    assert model.w[1][2].out_sharding == ("embed", "mlp")
    assert_trees_equal(plan.to_linen(model), {"params": {"w": box}})

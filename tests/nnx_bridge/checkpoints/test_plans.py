"""Checkpoints of models whose NNX rewrite has arrays of other shapes: what a plan does to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

from nnx_bridge import (
    CheckpointError,
    Plan,
    convert,
    from_train_state,
    load_checkpoint,
    match,
    to_train_state,
)
from nnx_bridge.checkpoints import _plan
from tests.helpers import assert_trees_equal, normal
from tests.nnx_bridge.checkpoints.files import assert_same_checkpoint, save

LAYERS = 3


def _cell(seed: int) -> dict[str, Any]:
    names = [f"{side}{gate}" for side in "ih" for gate in "ifgo"]
    return {
        name: {"kernel": normal(2, 2, seed=seed + i)}
        | ({"bias": normal(2, seed=seed + 20 + i)} if name[0] == "h" else {})
        for i, name in enumerate(names)
    }


# A fused cell; layers that `nn.scan` has stacked; and one that is only copied.
PARAMS = {
    "OptimizedLSTMCell_0": _cell(1),
    "layers": {"Dense_0": {"kernel": normal(LAYERS, 2, 2), "bias": normal(LAYERS, 2)}},
    "out": {"kernel": normal(2, 4), "bias": normal(4)},
}


class Native(nnx.Module):
    """One matrix for all gates, a list of layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.cell = nnx.OptimizedLSTMCell(2, 2, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(LAYERS)])
        self.out = nnx.Linear(2, 4, rngs=rngs)


def plan() -> Plan:
    return match({"params": PARAMS}, Native(nnx.Rngs(0)), stack_axis=0)


def train_state() -> TrainState:
    state = TrainState.create(apply_fn=nn.Dense(1).apply, params=PARAMS, tx=optax.adam(0.1))
    return state.apply_gradients(grads=PARAMS)


def expected(of: Any) -> Any:
    """What the plan makes of a tree in memory, at the places of the model's state."""
    return plan().to_nnx({"params": of})


def assert_continues(model: Native, optimizer: nnx.Optimizer, state: TrainState) -> None:
    assert_trees_equal(nnx.to_pure_dict(nnx.state(model)), expected(state.params))
    moments = optimizer.opt_state[0].mu
    assert_trees_equal(nnx.to_pure_dict(moments), expected(state.opt_state[0].mu))


def fresh() -> tuple[Native, nnx.Optimizer]:
    model = Native(nnx.Rngs(5))
    return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)


@pytest.mark.parametrize("kept", [_plan._KEPT, 0])
def test_a_checkpoint_is_joined_and_split_row_by_row_and_comes_back_to_the_letter(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_plan, "_KEPT", kept)
    linen = save(tmp_path / "linen", train_state())
    convert(linen, tmp_path / "nnx", plan=plan())
    model, optimizer = fresh()
    load_checkpoint(tmp_path / "nnx", model, optimizer)
    assert_continues(model, optimizer, train_state())
    convert(tmp_path / "nnx", tmp_path / "back", plan=plan())
    assert_same_checkpoint(tmp_path / "back", linen)


def test_a_linen_checkpoint_is_loaded_by_a_plan(tmp_path: Path) -> None:
    linen = save(tmp_path / "linen", train_state())
    model, optimizer = fresh()
    load_checkpoint(linen, model, optimizer, plan=plan())
    assert_continues(model, optimizer, train_state())


def test_a_live_train_state_goes_there_and_back() -> None:
    state, (model, optimizer) = train_state(), fresh()
    from_train_state(state, model, optimizer, plan=plan())
    assert_continues(model, optimizer, state)
    again = to_train_state(model, optimizer, like=state, plan=plan())
    assert_trees_equal(again.params, state.params)
    assert_trees_equal(again.opt_state, state.opt_state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(again.params))


def test_nothing_is_read_before_it_is_written() -> None:
    state = {"params": PARAMS}
    reads: list[Any] = []

    class Reader:
        def read(self, arrays: Any) -> list[Any]:
            reads.extend(arrays)
            return [jnp.ones(array.shape, array.dtype) for array in arrays]

    leaves = jax.tree_util.tree_leaves_with_path(state)
    entries = {}
    for path, leaf in leaves:
        names = tuple(key.key for key in path)
        stored = _plan.Stored(Reader(), names, leaf.shape, leaf.dtype)
        entries[_plan.marked(names[0], names[1:])] = stored
    made = _plan.apply(plan(), entries, (), ())
    assert not reads
    assert made["cell", "dense_h", "kernel"].load().shape == (2, 8)
    assert {array.path[2][0] for array in reads} == {"h"} and len(reads) == 4


def test_what_the_plan_was_not_made_for_is_named(tmp_path: Path) -> None:
    less = {name: value for name, value in PARAMS.items() if name != "out"}
    save(tmp_path / "less", {"params": less})
    with pytest.raises(CheckpointError, match="lacks params/out/.*, which the plan has"):
        convert(tmp_path / "less", tmp_path / "nnx", plan=plan())
    save(tmp_path / "more", {"params": {**PARAMS, "extra": {"w": normal(2)}}})
    with pytest.raises(CheckpointError, match="the plan has no params/extra/w"):
        convert(tmp_path / "more", tmp_path / "nnx", plan=plan())
    cell = {**PARAMS, "OptimizedLSTMCell_0": {**_cell(1), "hi": {"kernel": normal(2, 3)}}}
    save(tmp_path / "other", {"params": cell})
    with pytest.raises(CheckpointError, match="lacks params/OptimizedLSTMCell_0/hi/bias"):
        convert(tmp_path / "other", tmp_path / "nnx", plan=plan())
    cell["OptimizedLSTMCell_0"]["hi"] = {"kernel": normal(3, 2), "bias": normal(2)}
    save(tmp_path / "shape", {"params": cell})
    with pytest.raises(CheckpointError, match=r"does not convert .*hi/kernel.*\(3, 2\)"):
        convert(tmp_path / "shape", tmp_path / "nnx", plan=plan())
    assert not (tmp_path / "nnx").exists()


def test_what_nnx_has_no_place_for_must_be_zero(tmp_path: Path) -> None:
    cell, x = nn.GRUCell(2), jnp.ones((1, 2))
    variables = cell.init(jax.random.key(0), x, x)
    of_gru = match(variables, nnx.GRUCell(2, 2, rngs=nnx.Rngs(0)))
    linen = save(tmp_path / "linen", variables)
    convert(linen, tmp_path / "nnx", plan=of_gru)
    convert(tmp_path / "nnx", tmp_path / "back", plan=of_gru)
    back = ocp.PyTreeCheckpointer().restore(tmp_path / "back")
    assert_trees_equal(back["params"], variables["params"])
    variables["params"]["hn"]["bias"] += 1
    save(tmp_path / "trained", variables)
    with pytest.raises(CheckpointError, match="params/hn/bias.*expected zeros"):
        convert(tmp_path / "trained", tmp_path / "never", plan=of_gru)


def _cast_plan() -> tuple[dict[str, Any], Plan]:
    params = {"w": normal(4).astype(jnp.bfloat16), "v": normal(2)}

    class Wide(nnx.Module):
        def __init__(self) -> None:
            self.w, self.v = nnx.Param(jnp.zeros(4)), nnx.Param(jnp.zeros(2))

    return params, match({"params": params}, Wide(), cast=["w"])


def test_the_casts_of_a_plan_are_done_and_undone(tmp_path: Path) -> None:
    params, with_cast = _cast_plan()
    state = {"params": params, "opt_state": optax.adam(0.1).init(params), "step": 3}
    linen = save(tmp_path / "linen", state)
    convert(linen, tmp_path / "nnx", plan=with_cast)
    made = ocp.PyTreeCheckpointer().restore(tmp_path / "nnx")
    for tree in (made["model"], made["optimizer"]["opt_state"]["0"]["mu"]):
        assert {name: v["value"].dtype.name for name, v in tree.items()} == {
            "w": "float32",
            "v": "float32",
        }
    assert_trees_equal(made["model"]["w"]["value"], params["w"].astype(jnp.float32))
    convert(tmp_path / "nnx", tmp_path / "back", plan=with_cast)
    assert_same_checkpoint(tmp_path / "back", linen)


def test_moments_of_a_dtype_of_their_own_keep_it(tmp_path: Path) -> None:
    params, with_cast = _cast_plan()
    moments = optax.adam(0.1, mu_dtype=jnp.float16).init(params)
    linen = save(tmp_path / "linen", {"params": params, "opt_state": moments, "step": 3})
    convert(linen, tmp_path / "nnx", plan=with_cast)
    made = ocp.PyTreeCheckpointer().restore(tmp_path / "nnx")["optimizer"]["opt_state"]["0"]
    assert {made["mu"]["w"]["value"].dtype.name, made["nu"]["w"]["value"].dtype.name} == {
        "float16",
        "float32",
    }


def test_what_a_checkpoint_lacks_is_named_by_its_place_in_nnx(tmp_path: Path) -> None:
    linen = save(tmp_path / "linen", {"params": PARAMS})
    made = expected(PARAMS)
    del made["out"]
    save(tmp_path / "nnx", jax.tree.map(lambda x: {"value": x}, made))
    with pytest.raises(CheckpointError, match="lacks out/bias, out/kernel$"):
        convert(tmp_path / "nnx", tmp_path / "back", plan=plan(), like=linen)


def test_a_model_that_began_in_nnx_gets_the_structure_of_the_plan(tmp_path: Path) -> None:
    save(tmp_path / "nnx", jax.tree.map(lambda x: {"value": x}, expected(PARAMS)))
    convert(tmp_path / "nnx", tmp_path / "back", plan=plan())
    assert_trees_equal(ocp.PyTreeCheckpointer().restore(tmp_path / "back")["params"], PARAMS)


def test_a_run_that_began_in_nnx_needs_a_structure_beside_the_plan(tmp_path: Path) -> None:
    model, optimizer = fresh()
    save(tmp_path / "nnx", {"model": nnx.state(model), "optimizer": nnx.state(optimizer)})
    with pytest.raises(CheckpointError, match=r"name a Linen checkpoint .* like= \(--like\)"):
        convert(tmp_path / "nnx", tmp_path / "back", plan=plan())


def test_only_a_plan_is_taken_for_one(tmp_path: Path) -> None:
    save(tmp_path / "linen", {"params": PARAMS})
    with pytest.raises(TypeError, match="expected a plan of nnx_bridge.match, got dict"):
        convert(tmp_path / "linen", tmp_path / "nnx", plan={})  # type: ignore[arg-type]

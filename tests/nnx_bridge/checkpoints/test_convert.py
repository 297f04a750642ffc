"""Conversion of Orbax checkpoints: what was saved on one side restores on the other."""

from __future__ import annotations

from collections.abc import Callable
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

from nnx_bridge import CheckpointError, convert, load_checkpoint, match
from nnx_bridge.checkpoints import describe
from nnx_bridge.weights import Transpose
from tests.helpers import assert_trees_equal, normal
from tests.nnx_bridge.checkpoints.files import assert_same_checkpoint, metadata, restore, save
from tests.nnx_bridge.checkpoints.models import State, initial, native, nnx_optimizer, not_vectors

PARAMS = {
    "Dense_0": {"kernel": normal(2, 3), "bias": normal(3)},
    "Dense_1": {"kernel": normal(3, 1, seed=2), "bias": normal(1, seed=3)},
}


class Small(nnx.Module):
    """The NNX model of `PARAMS`."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.Dense_0 = nnx.Linear(2, 3, rngs=rngs)
        self.Dense_1 = nnx.Linear(3, 1, rngs=rngs)


def _labels(params: Any) -> Any:
    return jax.tree.map(lambda x: "matrix" if jnp.ndim(x) > 1 else "vector", params)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optax.sgd(0.1),
    "adam": lambda: optax.adam(0.1),
    "one transformation": lambda: optax.scale_by_adam(),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "schedule": lambda: optax.adam(optax.linear_schedule(0.1, 0.0, 5)),
    "masked": lambda: optax.masked(optax.adam(0.1), not_vectors),
    "decay mask": lambda: optax.adamw(0.1, mask=not_vectors),
    "multi_transform": lambda: optax.multi_transform(
        {"matrix": optax.adam(0.1), "vector": optax.set_to_zero()}, _labels
    ),
    "injected": lambda: optax.inject_hyperparams(optax.adamw, static_args=("mask",))(
        learning_rate=optax.linear_schedule(0.1, 0.0, 5), mask=not_vectors
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "average": lambda: optax.chain(optax.adam(0.1), optax.ema(0.9)),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "nested": lambda: optax.chain(
        optax.clip(1.0), optax.chain(optax.trace(0.9), optax.chain(optax.scale_by_adam()))
    ),
    "a field called params": lambda: optax.scale_by_lbfgs(1),
    "random numbers of its own": lambda: optax.add_noise(0.1, 0.5, jax.random.key(3)),
    "skipping": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
}


def _train_state(tx: Any) -> dict[str, Any]:
    state = tx.init(PARAMS)
    _, state = tx.update(PARAMS, state, PARAMS)
    return {"step": jnp.int32(7), "params": PARAMS, "opt_state": state}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizers_state_restores_in_nnx_and_comes_back_to_the_letter(
    name: str, tmp_path: Path
) -> None:
    tx = OPTIMIZERS[name]()
    linen = save(tmp_path / "linen", _train_state(tx))
    convert(linen, tmp_path / "nnx")
    model = Small()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    target = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    restored = restore(tmp_path / "nnx", target)
    nnx.update(model, restored["model"])
    # What the optimizer itself makes of the same parameters and gradients.
    optimizer.update(model, nnx.state(model, nnx.Param))
    optimizer.step.set_value(jnp.uint32(7))
    assert_trees_equal(restored["optimizer"], nnx.state(optimizer))
    convert(tmp_path / "nnx", tmp_path / "back")
    assert_same_checkpoint(tmp_path / "back", linen)


LINEN_LAYOUTS: dict[str, Callable[[], tuple[Any, str]]] = {
    "a train state": lambda: (initial(), "train_state"),
    "a dict like it": lambda: (_train_state(optax.adam(0.1)), "train_state"),
    "a train state beside other things": lambda: (
        {"model": _train_state(optax.adam(0.1)), "config": {"width": 3}, "data": [1, 2.5]},
        "train_state",
    ),
    "params in params": lambda: (
        {
            "params": {"params": PARAMS},
            "opt_state": optax.adam(0.1).init({"params": PARAMS}),
            "step": 1,
        },
        "train_state",
    ),
    "collections in one field": lambda: (
        {
            "params": PARAMS,
            "step": 1,
            "model_state": {"batch_stats": {"Dense_0": {"mean": normal(3)}}},
        },
        "train_state",
    ),
    "variables": lambda: (
        {"params": PARAMS, "batch_stats": {"Dense_0": {"mean": normal(3)}}},
        "variables",
    ),
    "parameters": lambda: (PARAMS, "params"),
    "boxed parameters": lambda: (
        {
            "params": {"Dense_0": {"kernel": nn.Partitioned(normal(2, 3), ("a", None))}},
            "step": 3,
            "opt_state": optax.adam(0.1).init(
                {"Dense_0": {"kernel": nn.Partitioned(normal(2, 3), ("a", None))}}
            ),
        },
        "train_state",
    ),
    "equal names in two collections": lambda: (
        {"params": {"d": {"w": normal(3)}}, "ema": {"d": {"w": normal(3, seed=5)}, "n": normal(1)}},
        "variables",
    ),
    "parameters in lists": lambda: (
        {
            "params": (lists := {"layers": [{"w": normal(2)}, {"w": normal(3)}], "v": normal(2)}),
            "opt_state": optax.adam(0.1).init(lists),
            "step": 1,
        },
        "train_state",
    ),
    "a scale in floats and a step too": lambda: (
        {"params": {"w": normal(2), "scale": 0.5}, "opt_state": None, "step": 2.0},
        "train_state",
    ),
    "names that NNX has for other things": lambda: (
        {"params": {"model": {"w": normal(2)}, "optimizer": {"step": normal(2)}}},
        "variables",
    ),
    "names of places and of collections": lambda: (
        {"params": {"0": {"w": normal(2)}, "1": {"w": normal(3)}, "params": {"value": normal(1)}}},
        "variables",
    ),
    "variables called as keys are": lambda: (
        {
            "params": {"hash_key": jnp.ones(2, jnp.uint32), "a/b": normal(2), "ä.✓": normal(3)},
            "state": {"rng": jax.random.key(1)},
        },
        "variables",
    ),
    "NumPy arrays of 64 bits": lambda: (
        {"params": {"w": np.arange(3, dtype=np.int64), "v": np.linspace(0, 1, 3)}},
        "variables",
    ),
}


@pytest.mark.parametrize("name", LINEN_LAYOUTS)
def test_the_layout_is_found_and_comes_back_to_the_letter(name: str, tmp_path: Path) -> None:
    tree, layout = LINEN_LAYOUTS[name]()
    linen = save(tmp_path / "linen", tree)
    assert convert(linen, tmp_path / "nnx").source_layout == layout
    assert convert(tmp_path / "nnx", tmp_path / "back").destination_layout == layout
    assert_same_checkpoint(tmp_path / "back", linen)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float8_e4m3fn", "int4", "bool", "complex64", "uint32"]
)
def test_dtypes_are_kept(dtype: str, tmp_path: Path) -> None:
    linen = save(tmp_path / "linen", {"params": {"w": normal(2, 3).astype(dtype)}})
    convert(linen, tmp_path / "nnx")
    convert(tmp_path / "nnx", tmp_path / "back")
    assert_same_checkpoint(tmp_path / "back", linen)


def test_a_layout_that_was_noted_need_not_be_guessed(tmp_path: Path) -> None:
    save(tmp_path / "linen", {"params": {"model": {"w": normal(2)}, "optimizer": {"step": {}}}})
    assert convert(tmp_path / "linen", tmp_path / "nnx").destination_layout == "nnx_model"
    assert describe(tmp_path / "nnx").layout == "nnx_model"
    with pytest.raises(CheckpointError, match="does not have the layout 'train_state'"):
        describe(tmp_path / "nnx", layout="train_state")


def _run_of_nnx() -> tuple[Any, Any]:
    model = native()
    optimizer = nnx_optimizer(model)
    optimizer.update(model, nnx.state(model, nnx.Param))
    return model, optimizer


NNX_LAYOUTS: dict[str, Callable[[Any, Any], Any]] = {
    "model and optimizer": lambda m, o: {"model": nnx.state(m), "optimizer": nnx.state(o)},
    "a state of both": lambda m, o: nnx.state((m, o)),
    "pure dicts": lambda m, o: {
        "model": nnx.to_pure_dict(nnx.state(m)),
        "optimizer": nnx.to_pure_dict(nnx.state(o)),
    },
    "a model": lambda m, o: nnx.state(m),
    "a model without streams": lambda m, o: nnx.state(m, nnx.Not(nnx.RngState)),
}


@pytest.mark.parametrize("name", NNX_LAYOUTS)
def test_a_run_that_began_in_nnx_restores_in_linen(name: str, tmp_path: Path) -> None:
    model, optimizer = _run_of_nnx()
    save(tmp_path / "nnx", NNX_LAYOUTS[name](model, optimizer))
    state = initial()
    like = {
        "params": state.params,
        "opt_state": state.opt_state,
        "step": jnp.int32(0),
        "batch_stats": state.batch_stats,
    }
    if "model and" in name or "both" in name or "pure" in name:
        save(tmp_path / "like", like)
        done = convert(tmp_path / "nnx", tmp_path / "linen", like=tmp_path / "like")
        assert not done.suggested
        restored = restore(tmp_path / "linen", like)
        assert restored["step"] == 1
        assert_trees_equal(
            restored["opt_state"][1][0].mu["Dense_0"]["kernel"],
            optimizer.opt_state[1][0].mu["Dense_0"]["kernel"][...],
        )
    else:
        convert(tmp_path / "nnx", tmp_path / "linen")
        target = {"params": state.params, "batch_stats": state.batch_stats}
        restored = restore(tmp_path / "linen", target)
    assert_trees_equal(restored["params"]["Conv_0"]["kernel"], model.Conv_0.kernel[...])
    assert_trees_equal(restored["batch_stats"]["BatchNorm_0"]["var"], model.BatchNorm_0.var[...])


def test_without_a_structure_to_follow_the_names_suggest_one(tmp_path: Path) -> None:
    model, optimizer = _run_of_nnx()
    save(tmp_path / "nnx", {"model": nnx.state(model), "optimizer": nnx.state(optimizer)})
    assert convert(tmp_path / "nnx", tmp_path / "linen").suggested
    tree = ocp.PyTreeCheckpointer().restore(tmp_path / "linen")
    assert set(tree) == {"params", "batch_stats", "opt_state", "step"}
    # The clip, in front, leaves a gap.
    assert tree["opt_state"][0] is None
    assert tree["opt_state"][1][0]["mu"]["Dense_0"]["bias"].shape == (4,)


def test_streams_of_an_nnx_model_are_kept_apart_and_come_back(tmp_path: Path) -> None:
    model, optimizer = _run_of_nnx()
    nnx_folder = save(
        tmp_path / "nnx", {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    )
    done = convert(nnx_folder, tmp_path / "linen")
    assert done.apart == (
        "model/Dropout_0/rngs/count/value",
        "model/Dropout_0/rngs/key/value",
    )
    assert not any("rngs" in path for path in metadata(tmp_path / "linen"))
    convert(tmp_path / "linen", tmp_path / "back")
    # In the structure of the first, to the letter.
    assert_trees_equal(
        *(ocp.PyTreeCheckpointer().restore(f) for f in (tmp_path / "back", nnx_folder))
    )


def test_keys_of_a_train_state_are_kept_apart_and_come_back(tmp_path: Path) -> None:
    linen = save(tmp_path / "linen", initial())
    assert convert(linen, tmp_path / "nnx").apart == ("dropout_key",)
    assert not any("dropout_key" in path for path in metadata(tmp_path / "nnx"))
    convert(tmp_path / "nnx", tmp_path / "back")
    state = initial()
    restored: State = restore(tmp_path / "back", state)
    assert_trees_equal(restored.dropout_key, state.dropout_key)


def test_sharded_arrays_stay_sharded(tmp_path: Path) -> None:
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices, real or simulated")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("b", "a"))
    save(tmp_path / "linen", {"params": {"w": jax.device_put(normal(4, 8), sharding)}})
    convert(tmp_path / "linen", tmp_path / "nnx")
    saved = ocp.PyTreeCheckpointer().metadata(tmp_path / "nnx").item_metadata["w"]["value"]
    assert saved.sharding.to_jax_sharding() == sharding
    assert saved.storage.chunk_shape == (2, 2)
    convert(tmp_path / "nnx", tmp_path / "one", unsharded=True)
    saved = ocp.PyTreeCheckpointer().metadata(tmp_path / "one").item_metadata["params"]["w"]
    assert saved.storage.chunk_shape == (4, 8)


def test_a_model_that_is_sharded_stays_so_when_it_is_filled(tmp_path: Path) -> None:
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices, real or simulated")
    save(tmp_path / "linen", {"params": {"kernel": normal(2, 8), "bias": normal(8)}})
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("a",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "a"))
    model = nnx.Linear(2, 8, rngs=nnx.Rngs(0))
    model.kernel.set_value(jax.device_put(model.kernel[...], sharding))
    load_checkpoint(tmp_path / "linen", model)
    assert model.kernel[...].sharding == sharding
    assert_trees_equal(model.kernel[...], normal(2, 8))


class _Turned(nnx.Module):
    """A layer whose kernel lies the other way round."""

    def __init__(self, n: int, m: int) -> None:
        self.weight, self.bias = nnx.Param(jnp.zeros((m, n))), nnx.Param(jnp.zeros(m))


class _Other(nnx.Module):
    """The model of `PARAMS` with other names and kernels."""

    def __init__(self) -> None:
        self.first, self.second = _Turned(2, 3), _Turned(3, 1)


_RULES = [
    ("Dense_0/kernel", "first/weight", Transpose()),
    ("Dense_1/kernel", "second/weight", Transpose()),
    ("Dense_0", "first"),
    ("Dense_1", "second"),
]


@pytest.mark.parametrize("name", ["adam", "masked", "multi_transform"])
def test_a_plan_moves_parameters_and_everything_that_follows_them(
    name: str, tmp_path: Path
) -> None:
    tree = _train_state(OPTIMIZERS[name]())
    linen = save(tmp_path / "linen", tree)
    plan = match({"params": PARAMS}, _Other(), _RULES)
    convert(linen, tmp_path / "nnx", plan=plan)
    made = ocp.PyTreeCheckpointer().restore(tmp_path / "nnx")
    assert_trees_equal(made["model"]["first"]["weight"]["value"], PARAMS["Dense_0"]["kernel"].T)
    moments = jax.tree_util.tree_flatten_with_path(made["optimizer"])[0]
    shapes = [leaf.shape for path, leaf in moments if "'weight'" in jax.tree_util.keystr(path)]
    assert set(shapes) == {(3, 2), (1, 3)}
    convert(tmp_path / "nnx", tmp_path / "back", plan=plan)
    assert_same_checkpoint(tmp_path / "back", linen)


def test_the_last_step_of_a_checkpoint_manager_is_taken(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (9, 10):
            tree = {"params": {"w": jnp.full(2, float(step))}}
            manager.save(step, args=ocp.args.StandardSave(tree))
    done = convert(tmp_path / "run", tmp_path / "nnx")
    assert done.source == tmp_path / "run" / "10" / "default"
    assert ocp.PyTreeCheckpointer().restore(tmp_path / "nnx")["w"]["value"][0] == 10


def test_of_several_items_one_must_be_named(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        items = {
            name: ocp.args.StandardSave({"params": {"w": jnp.full(2, value)}})
            for name, value in (("state", 1.0), ("ema", 2.0))
        }
        manager.save(1, args=ocp.args.Composite(**items))
    with pytest.raises(CheckpointError, match=r"several items \(ema, state\).*item="):
        convert(tmp_path / "run", tmp_path / "nnx")
    inside = tmp_path / "run" / "1" / "state"
    with pytest.raises(CheckpointError, match="state is a checkpoint itself and has no item 'ema'"):
        convert(inside, tmp_path / "nnx", item="ema")
    convert(tmp_path / "run", tmp_path / "nnx", item="ema")
    assert ocp.PyTreeCheckpointer().restore(tmp_path / "nnx")["w"]["value"][0] == 2


def test_progress_ends_at_all_bytes(tmp_path: Path) -> None:
    save(tmp_path / "linen", _train_state(optax.adam(0.1)))
    seen: list[tuple[int, int, str]] = []
    done = convert(tmp_path / "linen", tmp_path / "nnx", progress=lambda *a: seen.append(a))
    assert seen[-1][0] <= seen[-1][1] == done.nbytes
    assert [a[0] for a in seen] == sorted(a[0] for a in seen)


def test_an_unknown_layout_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    save(tmp_path / "linen", {"params": PARAMS})
    with pytest.raises(CheckpointError, match="'trainstate'; did you mean 'train_state'?"):
        convert(tmp_path / "linen", tmp_path / "nnx", layout="trainstate")


def test_a_layout_can_be_said_where_names_mislead(tmp_path: Path) -> None:
    save(tmp_path / "linen", {"a": {"value": normal(2)}, "b": {"value": normal(3)}})
    assert convert(tmp_path / "linen", tmp_path / "x").source_layout == "nnx_model"
    done = convert(tmp_path / "linen", tmp_path / "y", layout="params")
    assert (done.source_layout, done.destination_layout) == ("params", "nnx_model")


def test_a_model_that_is_a_list_is_no_pair_of_model_and_optimizer(tmp_path: Path) -> None:
    rngs = nnx.Rngs(0)
    model = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)])
    save(tmp_path / "nnx", nnx.state(model))
    done = convert(tmp_path / "nnx", tmp_path / "linen")
    assert (done.source_layout, done.arrays) == ("nnx_model", 4)


def test_what_has_no_array_is_no_checkpoint_of_a_model(tmp_path: Path) -> None:
    save(tmp_path / "linen", {"step": 3})
    with pytest.raises(CheckpointError, match="no array"):
        convert(tmp_path / "linen", tmp_path / "nnx")


FIRST, SECOND = PARAMS["Dense_0"], PARAMS["Dense_1"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"Dense_0": FIRST, "Dense_9": SECOND}, "lacks model/Dense_9/bias.*no place for model/Den"),
        ({**PARAMS, "Dense_9": SECOND}, "^the NNX checkpoint lacks model/Dense_9/bias/value, "),
        ({"Dense_0": FIRST}, "^the Linen structure has no place for model/Dense_1/bias/value, "),
    ],
    ids=["both sides", "too much", "too little"],
)
def test_a_structure_that_does_not_fit_is_an_error_that_lists_what_differs(
    params: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save(
        tmp_path / "nnx",
        {"model": nnx.state(Small()), "optimizer": {"step": {"value": jnp.uint32(1)}}},
    )
    like = {"params": params, "step": 1, "opt_state": optax.sgd(0.1).init(PARAMS)}
    save(tmp_path / "like", like)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "nnx", tmp_path / "linen", like=tmp_path / "like")


def test_two_fields_that_would_be_one_in_nnx_are_an_error(tmp_path: Path) -> None:
    state = _train_state(optax.sgd(0.1))
    save(tmp_path / "linen", {"state": {**state, "loss": jnp.ones(2)}, "loss": jnp.zeros(2)})
    with pytest.raises(CheckpointError, match="^state/loss and loss would both be loss in NNX$"):
        convert(tmp_path / "linen", tmp_path / "nnx")

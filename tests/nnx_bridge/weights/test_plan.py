"""Plans: shown, saved, edited; and how they convert trees of other values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from rich.console import Console

from nnx_bridge import Plan, WeightsError, load, match
from nnx_bridge.weights import Row
from tests.helpers import KEY, assert_trees_close, assert_trees_equal, normal, randomized
from tests.nnx_bridge.weights.builders import Holder, dense, variables

X = normal(2, 3)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        x = nn.RNN(nn.OptimizedLSTMCell(5))(x[None])[0]
        init = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
        return nn.Dense(2, kernel_init=init)(x)


class Native(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(4, 5, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(self.first(x), use_running_average=True)
        return self.head(self.rnn(x[None])[0])


WEIGHTS = randomized(jax.jit(Net().init)(KEY, X))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return match(WEIGHTS, Native(nnx.Rngs(0)))


def test_a_plan_that_was_saved_is_the_same(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    assert_trees_equal(Plan.read(tmp_path / "plan.json").to_linen(plan.to_nnx(WEIGHTS)), WEIGHTS)


def test_a_saved_plan_has_a_row_a_line(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert sum('"layout"' in line for line in lines) == len(plan.rows)


def test_a_plan_edited_as_text_is_applied(tmp_path: Path) -> None:
    linen = variables({"params/Dense_0/kernel": (4, 4), "params/Dense_1/kernel": (4, 4)})
    model = Holder(up=dense(4, 4, use_bias=False), down=dense(4, 4, use_bias=False))
    match(linen, model).save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    data["rows"] = [
        {"linen": [["params", "Dense_0", "kernel"]], "nnx": [["up", "kernel"]]},
        {
            "linen": [["params", "Dense_1", "kernel"]],
            "nnx": [["down", "kernel"]],
            "layout": {"kind": "transpose", "axes": [1, 0]},
        },
    ]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    load(model, linen, plan=Plan.read(tmp_path / "plan.json"))
    assert_trees_equal(model.up.kernel[...], linen["params"]["Dense_0"]["kernel"])
    assert_trees_equal(model.down.kernel[...], linen["params"]["Dense_1"]["kernel"].T)


def test_mistakes_of_an_edited_plan_are_named(plan: Plan) -> None:
    kernel = ("params", "Dense_0", "kernel")
    wrong = [Row((kernel,), (("frist", "kernel"),)), Row((kernel,), (("head", "kernel"),))]
    rows = tuple(row for row in plan.rows if row.linen[0] != kernel)
    texts = "\n".join(p.text for p in plan.replace(rows=(*rows, *wrong)).problems)
    assert "frist/kernel: not a path in NNX; nearest: first/kernel" in texts
    assert "params/Dense_0/kernel: 2 rows have it on the side of Linen, expected one" in texts
    assert "head/kernel: 2 rows have it on the side of NNX, expected one" in texts
    assert "params/Dense_0/kernel -> head/kernel: expected float32[5,2], came float32[3,4]" in texts


def test_the_table_shows_both_sides_and_what_is_wrong() -> None:
    linen = variables({"params/a/kernel": (4, 4), "params/b": (3,)})
    console = Console(width=120)
    with console.capture() as capture:
        console.print(match(linen, Holder(a=dense(4, 4))))
    text = capture.get()
    assert "params/a/kernel" in text
    assert "same path" in text
    assert "2 problem(s)" in text
    assert "missing: a/bias: expected float32[4]" in text


def test_what_is_no_plan_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"p.json: expected a plan of the format 'flaxlift weig"):
        Plan.read(tmp_path / "p.json")
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(ValueError, match=r"p.json: Expecting property name"):
        Plan.read(tmp_path / "p.json")
    (tmp_path / "p.json").write_text('{"format": "flaxlift weights plan 1", "rows": []}')
    with pytest.raises(ValueError, match="the plan has no 'linen', which it needs"):
        Plan.read(tmp_path / "p.json")


def test_moments_of_an_optimizer_are_converted_as_the_parameters(plan: Plan) -> None:
    model = Native(nnx.Rngs(0))
    load(model, WEIGHTS, plan=plan)
    params = nn.unbox(WEIGHTS["params"])

    def loss(params: Any) -> jax.Array:
        return jnp.sum(Net().apply({**WEIGHTS, "params": params}, X) ** 2)

    transform = optax.adam(1e-2)
    _, linen_state = transform.update(jax.jit(jax.grad(loss))(params), transform.init(params))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    optimizer.update(model, nnx.jit(nnx.grad(lambda m: jnp.sum(m(X) ** 2)))(model))
    for name in ("mu", "nu"):
        moments = getattr(linen_state[0], name)
        converted = plan.to_nnx({"params": moments})
        native = getattr(optimizer.opt_state[0], name)
        assert_trees_close(converted, nnx.to_pure_dict(native), factor=4)
        back = plan.to_linen(native, boxed=False)
        assert_trees_close(back["params"], moments, factor=4)


def test_masked_moments_stay_masked(plan: Plan) -> None:
    moments = jax.tree.map(lambda _: optax.MaskedNode(), nn.unbox(WEIGHTS["params"]))
    converted = plan.to_nnx({"params": moments})
    assert converted["rnn"]["cell"]["dense_h"]["kernel"] == optax.MaskedNode()
    assert plan.to_linen(converted, boxed=False)["params"] == moments


def test_shapes_alone_are_converted(plan: Plan) -> None:
    described = jax.eval_shape(lambda: WEIGHTS)
    converted = plan.to_nnx(described)
    leaf = converted["rnn"]["cell"]["dense_h"]["kernel"]
    assert leaf == jax.ShapeDtypeStruct((5, 20), jnp.float32)
    assert plan.to_linen(converted) == described


def test_values_are_asked_for_row_by_row(plan: Plan) -> None:
    held: set[Any] = set()
    most = 0

    def read(path: Any) -> np.ndarray:
        nonlocal most
        held.add(path)
        most = max(most, len(held))
        branch = nn.unbox(WEIGHTS)
        for key in path:
            branch = branch[key]
        return np.asarray(branch)

    found = {}
    for path, value in plan.stream_to_nnx(read):
        held.clear()
        found[path] = value
    assert most == 4  # The gates of the cell.
    assert set(found) == {target.path for target in plan.nnx}


def test_sharded_arrays_stay_sharded() -> None:
    mesh = jax.make_mesh((2,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    linen = variables({f"params/{i}{g}/kernel": (4, 4) for i in "ih" for g in "ifgo"})
    linen["params"] |= variables({f"h{g}/bias": (4,) for g in "ifgo"})
    for name, layer in linen["params"].items():
        kernel = layer.get("kernel")
        linen["params"][name] = {**layer, "kernel": jax.device_put(normal(4, 4), sharding)}
        del kernel
    converted = match(linen, nnx.OptimizedLSTMCell(4, 4, rngs=nnx.Rngs(0))).to_nnx(linen)
    assert len(converted["dense_h"]["kernel"].sharding.device_set) == 2


def test_a_tree_that_lacks_an_array_is_an_error(plan: Plan) -> None:
    params = {**nn.unbox(WEIGHTS["params"])}
    params["Dnse_0"] = params.pop("Dense_0")
    with pytest.raises(WeightsError, match="missing: params/Dense_0/bias; nearest: params/Dns"):
        plan.to_nnx({"params": params})
    with pytest.raises(WeightsError, match="not in the plan: params/Dnse_0/kernel; near"):
        plan.to_nnx({"params": params})


def test_an_nnx_tree_that_lacks_an_array_is_an_error(plan: Plan) -> None:
    tree = plan.to_nnx(WEIGHTS)
    del tree["head"]["bias"]
    with pytest.raises(WeightsError, match="NNX tree is not that of the plan:\n  missing: head/b"):
        plan.to_linen(tree)
    with pytest.raises(TypeError, match="an NNX module, a state or nested dicts, got list"):
        plan.to_linen([])


def test_an_array_that_does_not_fit_its_layout_is_named(plan: Plan) -> None:
    tree = plan.to_nnx(WEIGHTS)
    tree["rnn"]["cell"]["dense_h"]["bias"] = jnp.zeros(7)
    with pytest.raises(WeightsError, match=r"cell/dense_h/bias: expected length 20 along axis -1"):
        plan.to_linen(tree)


def test_a_box_of_another_kind_cannot_be_saved() -> None:
    class Box(nn.Partitioned):
        pass

    linen = {"params": {"w": Box(jnp.zeros(3), (None,))}}
    plan = match(linen, Holder(w=nnx.Param(jnp.zeros(3))))
    with pytest.raises(TypeError, match=r"params/w: a Box cannot be written as JSON"):
        plan.to_json()

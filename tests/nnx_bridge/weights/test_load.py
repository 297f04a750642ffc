"""`load`: all or nothing, and nothing wrong in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from nnx_bridge import Host, Plan, WeightsError, load, match
from nnx_bridge.weights import Certainty
from tests.helpers import KEY, assert_trees_equal, normal, randomized
from tests.nnx_bridge.weights.builders import Holder, Linear, dense, variables

X = normal(2, 4)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(nn.Dense(4)(x))
        return nn.Dense(4)(x)


class Native(nnx.Module):
    def __init__(self, layer: Callable[[int, int], Any] = dense) -> None:
        self.fc1 = layer(4, 4)
        self.fc2 = layer(4, 4)
        self.drop = nnx.Dropout(0.0, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.drop(jnp.tanh(self.fc1(x))))


LINEN = Net()
WEIGHTS = randomized(LINEN.init(KEY, X))
CALLS = (lambda v: LINEN.apply(v, X), lambda m: m(X))


def refused(message: str, weights: Any = WEIGHTS, **options: Any) -> None:
    """The load fails with the message, and the model is as it was."""
    model = options.pop("model", None) or Native()
    before = nnx.clone(model)
    with pytest.raises(WeightsError, match=message):
        load(model, weights, **options)
    assert_trees_equal(nnx.state(model), nnx.state(before))


def changed(**changes: Any) -> dict[str, Any]:
    """The weights with another first layer."""
    layer = {**WEIGHTS["params"]["Dense_0"], **changes}
    layer = {name: value for name, value in layer.items() if value is not None}
    return {"params": {**WEIGHTS["params"], "Dense_0": layer}}


def test_the_model_computes_what_linen_computes() -> None:
    model = Native()
    load(model, WEIGHTS)
    assert_trees_equal(model(X), LINEN.apply(WEIGHTS, X))


def test_variables_stay_the_objects_that_they_were() -> None:
    # An optimizer, or another module, may share them.
    model = Native()
    kernel = model.fc1.kernel
    load(model, WEIGHTS)
    assert model.fc1.kernel is kernel


def test_a_dry_run_changes_nothing() -> None:
    model = Native()
    before = nnx.clone(model)
    assert isinstance(load(model, WEIGHTS, dry_run=True), Plan)
    assert_trees_equal(nnx.state(model), nnx.state(before))


def test_a_dry_run_shows_problems_and_does_not_raise() -> None:
    assert load(Native(), {"params": {}}, dry_run=True).problems


def test_an_array_that_is_missing_is_an_error() -> None:
    refused(r"fc\d/bias: expected float32\[4\], nothing in Linen was found", changed(bias=None))


def test_an_array_too_much_is_an_error() -> None:
    extra = {"params": {**WEIGHTS["params"], "extra": {"w": X}}}
    refused(r"params/extra/w: came float32\[2,4\], nothing in the model was found for it", extra)


def test_an_array_of_another_shape_is_an_error() -> None:
    names = {"params": {"fc1": WEIGHTS["params"]["Dense_0"], "fc2": WEIGHTS["params"]["Dense_1"]}}
    names["params"]["fc1"] = {**names["params"]["fc1"], "kernel": normal(3, 4)}
    refused(r"fc1/kernel: expected float32\[4,4\], came float32\[3,4\]", names)


def test_an_array_of_another_dtype_is_an_error_unless_it_may_be_cast() -> None:
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), WEIGHTS)
    refused(r"float32\[4,4\], came bfloat16\[4,4\]; cast=\['fc1/kernel'\] converts", half)
    model = Native()
    load(model, half, cast=["fc*"])
    assert model.fc1.kernel.dtype == jnp.float32
    np.testing.assert_array_equal(
        model.fc1.kernel[...], half["params"]["Dense_0"]["kernel"].astype(jnp.float32)
    )


def test_differences_can_be_allowed_by_name() -> None:
    model = Native()
    old = model.fc1.bias[...]
    weights = {"params": {**changed(bias=None)["params"], "extra": {"w": X}}}
    load(model, weights, [("Dense_0", "fc1")], allow_missing=["fc1/bias"], allow_extra=["extra"])
    assert_trees_equal(model.fc1.bias[...], old)
    assert_trees_equal(model.fc1.kernel[...], WEIGHTS["params"]["Dense_0"]["kernel"])


def test_exchanged_layers_are_found_by_the_calls_that_follow() -> None:
    rules = [("Dense_0", "fc2"), ("Dense_1", "fc1")]
    load(Native(), WEIGHTS, rules)  # Equal shapes: the plan cannot see it.
    refused(
        r"output: differs by .* at most .* is rounding\nThe model was left",
        rules=rules,
        calls=CALLS,
    )


def test_transposed_square_kernels_are_found_by_the_calls_that_follow() -> None:
    load(Native(Linear), WEIGHTS)  # All square: the plan cannot see it.
    refused("the outputs differ with these weights", model=Native(Linear), calls=CALLS)


class Inverted(nn.Module):
    """The layer that is used last is made first, and has the first number."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4)(jnp.tanh(nn.Dense(4)(x)))


def test_the_order_of_use_is_believed_more_than_numbers() -> None:
    linen = Inverted()
    weights = linen.init(KEY, X)
    assert {row.certainty for row in match(weights, Native()).rows} == {Certainty.NUMBERS}
    model = Native()
    plan = load(model, weights, calls=(lambda v: linen.apply(v, X), CALLS[1]))
    assert {row.certainty for row in plan.rows} == {Certainty.USE}
    assert_trees_equal(model.fc1.kernel[...], weights["params"]["Dense_1"]["kernel"])


def test_right_weights_pass_the_calls() -> None:
    model = Native()
    load(model, WEIGHTS, calls=CALLS)
    assert_trees_equal(model(X), LINEN.apply(WEIGHTS, X))


def test_the_calls_leave_no_trace_in_the_model() -> None:
    linen, x = nn.BatchNorm(use_running_average=False), normal(5, 4)
    weights = randomized(linen.init(KEY, x))
    model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    calls = (lambda v: linen.apply(v, x, mutable=["batch_stats"])[0], lambda m: m(x))
    load(model, weights, calls=calls)
    assert_trees_equal(model.mean[...], weights["batch_stats"]["mean"])


def test_outputs_that_cannot_be_compared_are_an_error() -> None:
    refused("the calls cannot be compared", calls=(CALLS[0], lambda m: (m(X), 1)))
    refused(r"expected float32\[2,4\], came float32\[4\]", calls=(CALLS[0], lambda m: m(X)[0]))


def test_weights_that_are_not_a_number_are_compared_too() -> None:
    weights = changed(bias=jnp.array([jnp.nan, 0, 0, 0]))
    load(Native(), weights, calls=CALLS)


def test_an_abstract_model_is_filled() -> None:
    model = nnx.eval_shape(Native)
    load(model, WEIGHTS, allow_missing=["drop*"])
    assert_trees_equal(model.fc1.kernel[...], WEIGHTS["params"]["Dense_0"]["kernel"])


def test_numpy_weights_become_arrays_of_jax() -> None:
    model = Native()
    load(model, jax.tree.map(np.asarray, WEIGHTS))
    assert isinstance(model.fc1.kernel.get_value(), jax.Array)


def test_the_arrays_of_a_sharded_model_stay_where_they_are() -> None:
    mesh = jax.make_mesh((2,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    model = Native()
    model.fc1.kernel.set_value(jax.device_put(model.fc1.kernel[...], sharding))
    load(model, WEIGHTS)
    assert model.fc1.kernel[...].sharding == sharding


def test_shared_variables_are_filled_once() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.a = dense(4, 4)
            self.b = self.a

    model = Tied()
    load(model, {"params": {"shared": WEIGHTS["params"]["Dense_0"]}})
    assert model.b.kernel is model.a.kernel
    assert_trees_equal(model.b.kernel[...], WEIGHTS["params"]["Dense_0"]["kernel"])


def test_numbers_of_python_and_none_stay_what_they_are() -> None:
    model = Holder(a=nnx.Param(1.0), b=nnx.Param(None))
    plan = load(model, {"params": {"a": 2.0, "b": None}})
    assert plan.to_linen(model) == {"params": {"a": 2.0, "b": None}}
    assert type(model.a.get_value()) is float


def test_a_host_is_filled() -> None:
    model = Host(LINEN, jax.tree.map(jnp.zeros_like, WEIGHTS))
    load(model, WEIGHTS)
    assert_trees_equal(model(X), LINEN.apply(WEIGHTS, X))


def test_a_plan_for_other_models_is_an_error() -> None:
    plan = match(WEIGHTS, Native())
    other = variables({"params/Dense_0/kernel": (4, 4)})
    refused(
        "made for other models:.*\n.*params/Dense_0/bias: the plan has float32", other, plan=plan
    )
    model = Holder(fc1=dense(4, 4))
    refused(r"NNX, fc2/bias: the plan has float32\[4\], came nothing", plan=plan, model=model)


def test_a_plan_and_rules_together_are_an_error() -> None:
    plan = match(WEIGHTS, Native())
    with pytest.raises(TypeError, match="with a plan, rules, cast must be left out"):
        load(Native(), WEIGHTS, [("a", "b")], plan=plan, cast=["*"])


def test_a_state_is_no_model() -> None:
    with pytest.raises(TypeError, match="expected an NNX module, got State"):
        load(nnx.state(Native()), WEIGHTS)


def test_very_many_problems_are_not_all_listed() -> None:
    weights = variables({f"params/a{i}x/w": (i + 1,) for i in range(200)})
    with pytest.raises(WeightsError, match=r"200 problem\(s\):[\s\S]*\.\.\. and 160 more$"):
        load(Holder(), weights)


def test_parameters_without_their_collection_are_known_as_such() -> None:
    refused(
        r"no collection that the model knows, but Dense_0, Dense_1: .*written {'params': param",
        WEIGHTS["params"],
    )


def test_arguments_of_other_types() -> None:
    bad: Any
    for bad in (None, [WEIGHTS]):
        with pytest.raises(TypeError, match="variables must be nested dicts by collection"):
            load(Native(), bad)
    with pytest.raises(TypeError, match="expected an NNX module, got Dense"):
        load(nn.Dense(4), WEIGHTS)  # type: ignore[arg-type]
    for bad in (CALLS[1], CALLS[:1]):
        with pytest.raises(TypeError, match="calls are two functions"):
            load(Native(), WEIGHTS, calls=bad)

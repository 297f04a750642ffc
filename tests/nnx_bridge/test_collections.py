"""Linen collections as NNX state, and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from hypothesis import given

from nnx_bridge import collection_name, to_state, to_variables, variable_type
from tests.helpers import assert_trees_equal
from tests.strategies import Unit, linen_variables


class Quantised(Unit):
    """A user's box with a second array in it."""

    scale: Any


@pytest.mark.parametrize(
    ("collection", "kind"),
    [
        ("params", nnx.Param),
        ("batch_stats", nnx.BatchStat),
        ("cache", nnx.Cache),
        ("intermediates", nnx.Intermediate),
        ("perturbations", nnx.Perturbation),
    ],
)
def test_flaxs_collections_are_flaxs_variable_types(collection: str, kind: type) -> None:
    assert variable_type(collection) is kind
    assert collection_name(kind) == collection


def test_an_unknown_collection_gets_a_type_that_leads_back_to_it() -> None:
    kind = variable_type("a collection of ours")
    assert issubclass(kind, nnx.Variable)
    assert collection_name(kind) == "a collection of ours"
    assert variable_type("a collection of ours") is kind


def test_a_pair_that_a_user_registered_is_used() -> None:
    @nnx.register_variable_name("registered_here")
    class Registered(nnx.Variable[Any]):
        pass

    assert variable_type("registered_here") is Registered
    assert collection_name(Registered) == "registered_here"


def test_a_type_that_was_not_registered_goes_by_its_name() -> None:
    class NotRegistered(nnx.Param[Any]):
        pass

    assert collection_name(NotRegistered) == "NotRegistered"
    assert variable_type("NotRegistered") is NotRegistered


def test_a_type_whose_name_is_a_collection_already_is_an_error_that_says_what_to_do() -> None:
    taken = type("params", (nnx.Variable,), {})
    with pytest.raises(ValueError, match=r"'params' is that of .*Param.*register_variable_name"):
        collection_name(taken)


def test_each_value_becomes_a_variable_at_its_path() -> None:
    state = to_state({"params": {"Dense_0": {"kernel": jnp.ones((2, 3))}}})
    assert [path for path, _ in nnx.to_flat_state(state)] == [("Dense_0", "kernel")]
    assert type(state["Dense_0"]["kernel"]) is nnx.Param


def test_the_state_is_that_of_the_same_native_module() -> None:
    linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    nnx.update(linear, to_state({"params": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}))
    np.testing.assert_array_equal(linear(jnp.ones((1, 2))), [[3.0, 3.0, 3.0]])


def test_equal_names_in_two_collections_are_kept_apart() -> None:
    variables = {"params": {"w": 1.0}, "ema": {"w": 2.0}, "batch_stats": {"w": 3.0}}
    state = to_state(variables)
    assert state["w"].get_value() == 1.0
    assert state["ema_w"].get_value() == 2.0
    assert_trees_equal(to_variables(state), variables)


def test_the_order_of_collections_does_not_matter_to_names() -> None:
    one = to_state({"params": {"w": 1.0}, "ema": {"w": 2.0}})
    other = to_state({"ema": {"w": 2.0}, "params": {"w": 1.0}})
    assert jax.tree.structure(one) == jax.tree.structure(other)


def test_a_name_made_for_a_second_collection_does_not_hit_a_third_variable() -> None:
    variables = {"params": {"w": 1.0, "ema_w": 2.0}, "ema": {"w": 3.0}}
    assert_trees_equal(to_variables(to_state(variables)), variables)


def test_a_variable_named_as_a_submodule_is_kept_apart() -> None:
    variables = {"params": {"a": {"w": 1.0}}, "cache": {"a": 2.0}}
    assert_trees_equal(to_variables(to_state(variables)), variables)


def test_names_with_slashes_stay_one_name() -> None:
    variables = {"batch_stats": {"layer_instance/kernel/u": jnp.ones(3)}}
    assert_trees_equal(to_variables(to_state(variables)), variables)


def test_frozen_variables_are_taken() -> None:
    assert_trees_equal(
        to_variables(to_state(freeze({"params": {"w": 1.0}}))), {"params": {"w": 1.0}}
    )


@pytest.mark.parametrize(
    "value",
    [
        nn.Partitioned(jnp.ones((2, 3)), ("data", None)),
        nn.LogicallyPartitioned(jnp.ones((2, 3)), ("embed", "mlp"), rules=(("embed", "data"),)),
        Unit(jnp.ones(3), unit="m"),
        Unit({"re": jnp.ones(3), "im": jnp.zeros(3)}, unit="m"),
        Quantised(jnp.ones(3, jnp.int8), unit="m", scale=jnp.float32(0.1)),
        nn.Partitioned(Unit(jnp.ones((2, 3)), unit="m"), ("data", None)),
        nnx.bridge.NNXMeta(nnx.Param, jnp.ones(3), {"out_sharding": ("model",), "note": "mine"}),
        (jnp.ones(3), jnp.zeros(2)),
        None,
        jax.random.key(0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_and_their_boxes_come_back_as_they_were(value: Any) -> None:
    variables = {"params": {"w": value}}
    back = to_variables(to_state(variables))
    assert_trees_equal(back, variables)
    assert type(back["params"]["w"]) is type(value)


def test_boxes_are_not_changed_by_opening_them() -> None:
    # `LogicallyPartitioned.to_nnx_metadata` takes the fields out of the box that it is called on.
    box = nn.LogicallyPartitioned(jnp.ones((2, 3)), ("embed", "mlp"))
    to_state({"params": {"w": box}})
    assert box.names == ("embed", "mlp")


def test_the_names_of_a_partitioned_value_are_the_sharding_of_its_variable() -> None:
    state = to_state({"params": {"w": nn.Partitioned(jnp.ones((2, 3)), ("data", None))}})
    spec = nnx.get_partition_spec(state)["w"].get_value()
    assert spec == jax.sharding.PartitionSpec("data", None)


def test_an_axis_that_an_nnx_transform_adds_comes_back_in_the_box() -> None:
    boxed = nn.Partitioned(jnp.ones((4, 2)), ("data", None))

    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def stack(scale: jax.Array) -> nnx.State:
        return jax.tree.map(lambda x: x * scale, to_state({"params": {"w": boxed}}))

    stacked = to_variables(stack(jnp.arange(3.0)))["params"]["w"]
    assert stacked.names == ("layers", "data", None)
    assert stacked.value.shape == (3, 4, 2)


def test_a_box_for_another_variable_type_than_its_collection_is_an_error() -> None:
    box = nnx.bridge.NNXMeta(nnx.BatchStat, jnp.ones(3), {})
    with pytest.raises(ValueError, match="BatchStat, but 'params' stands for Param.*'batch_stats'"):
        to_state({"params": {"w": box}})


def test_parameters_without_their_collection_are_an_error_that_shows_the_form() -> None:
    with pytest.raises(TypeError, match=r"got ArrayImpl at 'kernel'.*\{'params': parameters\}"):
        to_state({"kernel": jnp.ones(3)})


def test_two_variables_at_one_linen_path_are_an_error() -> None:
    state = to_state({"params": {"w": 1.0}, "ema": {"w": 2.0}})
    del state["w"]
    state["w"] = variable_type("ema")(3.0)
    with pytest.raises(ValueError, match="two variables have the Linen path 'ema/w'"):
        to_variables(state)


@given(linen_variables())
def test_any_variables_come_back_as_they_were(variables: dict[str, Any]) -> None:
    assert_trees_equal(to_variables(to_state(variables)), variables)


def test_what_is_given_in_place_of_variables_or_of_a_state_is_named() -> None:
    with pytest.raises(ValueError, match="'Dense_0' is the name of a module.*'params': param"):
        to_state({"Dense_0": {"sub": {"kernel": jnp.ones(2)}}})
    with pytest.raises(TypeError, match=r"as nnx.state\(module\) gives it; got Linear$"):
        to_variables(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))  # type: ignore[arg-type]

"""What a rate, a key and a generator may be."""

import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import layers
from tests.helpers import KEY


@pytest.mark.parametrize("rate", [1.0, 1, -0.1, 1.5, float("inf"), float("nan")])
def test_a_rate_outside_the_unit_interval_is_a_value_error_with_the_value(rate, key):
    with pytest.raises(ValueError, match=re.escape(f"got {float(rate)!r}")):
        layers.drop_weight(jnp.ones(3), key, rate)


@pytest.mark.parametrize("rate", ["0.5", None, True, 0.5j, jnp.float32(0.5), [0.5]])
def test_a_rate_of_the_wrong_type_is_a_type_error_with_the_value(rate, key):
    with pytest.raises(TypeError, match=r"rate must be a real number in \[0, 1\), got"):
        layers.drop_weight(jnp.ones(3), key, rate)


LINEAR = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
BUILDERS = {
    "DropConnectLinear": lambda rate: layers.DropConnectLinear(LINEAR, rate),
    "create": lambda rate: layers.DropConnectLinear.create(2, 2, rate, rngs=nnx.Rngs(0)),
    "WeightDrop": lambda rate: layers.WeightDrop(LINEAR, rate),
    "dropconnect": lambda rate: layers.dropconnect(LINEAR, rate, keep_first=False),
    "drop_weights": lambda rate: layers.drop_weights(LINEAR, KEY, rate),
    "drop_params": lambda rate: layers.linen.drop_params({"kernel": jnp.ones((2, 2))}, KEY, rate),
    "keep_mask": lambda rate: layers.keep_mask(KEY, (2, 2), rate),
    "fused_product": lambda rate: layers.fused_product(
        jnp.ones((2, 2)), jnp.ones((2, 2)), KEY, rate
    ),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize(
    "rate, error", [(1.0, ValueError), (float("nan"), ValueError), (True, TypeError)]
)
def test_every_way_to_give_a_rate_checks_it_at_once(build, rate, error):
    with pytest.raises(error, match=f"rate must be .*got {rate!r}"):
        build(rate)


@pytest.mark.parametrize("rate", [0, 0.0, np.float32(0.25), np.float64(0.5), Fraction(1, 3)])
def test_every_real_number_in_range_is_a_rate(rate, key):
    assert layers.drop_weight(jnp.ones(3), key, rate).shape == (3,)


def test_a_rate_spoiled_after_construction_is_found_at_the_call(key):
    layer = layers.DropConnectLinear.create(2, 2, rngs=nnx.Rngs(0))
    layer.rate = 2.0
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\).*got 2.0"):
        layer(jnp.ones((1, 2)))


def test_an_unknown_generator_is_named_with_the_known_ones(key):
    with pytest.raises(ValueError, match="'default', 'fast', 'bernoulli', got 'quick'"):
        layers.drop_weight(jnp.ones(3), key, 0.5, generator="quick")


@pytest.mark.parametrize(
    "bad, message",
    [
        (0, "got 0 of type int"),
        (jnp.ones(2), "dtype float32"),
        (jax.random.split(jax.random.key(0), 3), r"array of keys of shape \(3,\).*vmap"),
        (nnx.Rngs(0), "of type Rngs"),
    ],
)
def test_a_key_that_is_not_one_key_is_a_type_error(bad, message):
    with pytest.raises(TypeError, match=message):
        layers.drop_weight(jnp.ones(3), bad, 0.5)


@pytest.mark.parametrize("form", [lambda raw: raw, np.asarray], ids=["jax", "numpy"])
def test_a_raw_key_draws_the_mask_of_the_typed_key(form, generator):
    raw, typed = form(jax.random.PRNGKey(3)), jax.random.key(3)
    masks = [layers.keep_mask(key, (9, 9), 0.5, generator=generator) for key in (raw, typed)]
    np.testing.assert_array_equal(*masks)


def test_an_integer_weight_is_refused(key):
    with pytest.raises(TypeError, match=r"floating or complex dtype, got int32 with shape \(3,\)"):
        layers.drop_weight(jnp.ones(3, jnp.int32), key, 0.5)


@given(rate=st.floats(0.0, 1.0, exclude_max=True), name=st.sampled_from(["default", "fast"]))
def test_the_probability_used_is_the_callers_to_the_stated_resolution(rate, name):
    used = layers.keep_probability(rate, name)
    assert abs(used - (1 - rate)) <= 2.0**-32
    assert used == 1.0 if rate == 0.0 else 0.0 < used < 1.0


def test_bernoulli_states_the_probability_of_a_float32_comparison():
    # jax.random.uniform has 2**23 values; those below float32(0.9) are kept.
    below = int(np.ceil(float(np.float32(0.9)) * 2**23))
    assert layers.keep_probability(0.1, "bernoulli") == below / 2**23

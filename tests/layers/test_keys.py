"""Where the key of a mask comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import DropConnectLinear
from tests.helpers import normal

X = normal(3, 4)


def base():
    return nnx.Linear(4, 5, rngs=nnx.Rngs(0))


def make():
    return DropConnectLinear(base(), 0.5, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("call", [{"deterministic": True}, {}])
def test_no_key_is_needed_when_nothing_is_dropped(call):
    layer = DropConnectLinear(base(), rate=0.0 if not call else 0.5)
    np.testing.assert_array_equal(layer(X, **call), base()(X))


def test_a_missing_key_says_how_to_give_one():
    with pytest.raises(ValueError, match=r"DropConnectLinear needs a key.*dropconnect=seed"):
        DropConnectLinear(base())(X)


def test_missing_streams_say_how_to_name_one():
    rngs = nnx.Rngs(params=0)
    for attempt in (lambda: DropConnectLinear(base(), rngs=rngs), lambda: make()(X, rngs=rngs)):
        with pytest.raises(ValueError, match="no stream 'dropconnect'.*nnx.Rngs"):
            attempt()


@pytest.mark.parametrize("wrong", [0, "key", jnp.ones(2)])
def test_a_source_that_holds_no_key_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="must be"):
        make()(X, rngs=wrong)
    with pytest.raises(TypeError, match="must be"):
        DropConnectLinear(base(), rngs=wrong)


def test_the_collection_must_be_a_string():
    with pytest.raises(TypeError, match="rng_collection must be a str, got 3"):
        DropConnectLinear(base(), rng_collection=3)


def test_every_source_of_a_key_draws_the_same_mask():
    key = nnx.Rngs(dropconnect=4).dropconnect()
    sources = [nnx.Rngs(dropconnect=4), nnx.Rngs(4), nnx.Rngs(dropconnect=4).dropconnect, key]
    sources += [jax.random.key_data(key), np.asarray(jax.random.key_data(key))]
    outputs = [make()(X, rngs=source) for source in sources]
    # A default stream is seeded alike, so even it agrees.
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])


@pytest.mark.parametrize(
    "source",
    [
        lambda: nnx.Rngs(3),
        lambda: nnx.Rngs(3).default,
        lambda: jax.random.key(3),
        lambda: jax.random.PRNGKey(3),
        lambda: np.asarray(jax.random.PRNGKey(3)),
    ],
)
def test_the_layer_holds_a_stream_of_its_own_from_any_source(source):
    layer = DropConnectLinear(base(), 0.5, rngs=source())
    assert isinstance(layer.rngs, nnx.RngStream)
    assert (layer(X) != layer(X, deterministic=True)).any()
    assert int(layer.rngs.count[...]) == 1


@pytest.mark.parametrize("whole", [False, True])
def test_a_stream_is_forked_not_shared(whole):
    rngs = nnx.Rngs(3)
    stream = rngs.default
    layer = DropConnectLinear(base(), 0.5, rngs=rngs if whole else stream)
    assert layer.rngs is not stream and int(stream.count[...]) == 1
    layer(X)
    assert int(stream.count[...]) == 1


def test_another_collection_is_asked_for_by_its_name():
    layer = DropConnectLinear(base(), 0.5, rng_collection="noise")
    a = layer(X, rngs=nnx.Rngs(noise=1, dropconnect=2))
    np.testing.assert_array_equal(a, layer(X, rngs=nnx.Rngs(noise=1, dropconnect=3)))


def test_a_key_in_the_call_leaves_the_held_counter_alone(key):
    layer = make()
    layer(X, rngs=key)
    assert int(layer.rngs.count[...]) == 0

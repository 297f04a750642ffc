"""Native NNX layers draw what Linen's layers draw."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from flax import linen as nn
from flax import nnx

from nnx_bridge import linen_key, linen_rngs
from tests.helpers import assert_trees_equal, normal

KEY = jax.random.key(4)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        drop = nn.Dropout(0.5, deterministic=False)
        return nn.Dropout(0.3, deterministic=False, rng_collection="noise")(drop(drop(x)))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Block(name="inner")(x)


class NativeBlock(nnx.Module):
    def __init__(self) -> None:
        self.Dropout_0 = nnx.Dropout(0.5)
        self.Dropout_1 = nnx.Dropout(0.3, rng_collection="noise", rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.Dropout_1(self.Dropout_0(self.Dropout_0(x)))


class Native(nnx.Module):
    def __init__(self) -> None:
        self.block = NativeBlock()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block(x)


PATHS = {"block/Dropout_0": "inner/Dropout_0", "block/Dropout_1": "inner/Dropout_1"}


def test_layers_that_are_called_twice_and_other_streams_draw_linens_masks() -> None:
    x = normal(5, 6)
    keys = {"dropout": KEY, "noise": jax.random.key(9)}
    model = Native()

    @nnx.jit
    def run(model: Any, x: jax.Array, keys: Any) -> jax.Array:
        with linen_rngs(model, keys, paths=PATHS):
            return model(x)

    assert_trees_equal(run(model, x, keys), Linen().apply({}, x, rngs=keys))


def test_the_layers_have_their_own_streams_again_afterwards() -> None:
    model = Native()
    before = nnx.state(model)
    with pytest.raises(ZeroDivisionError), linen_rngs(model, {"noise": KEY}, paths=PATHS):
        raise ZeroDivisionError
    assert_trees_equal(nnx.state(model), before)
    assert model.block.Dropout_0.rngs is None


def test_a_path_that_is_no_layers_is_named() -> None:
    with pytest.raises(ValueError, match="at 'block/x'; they are at block/Dropout_0, block/Dr"):
        with linen_rngs(Native(), {"dropout": KEY}, paths={"block/x": "y"}):
            pass


@pytest.mark.parametrize("calls", [0, 2])
def test_a_key_is_that_of_the_module_at_the_path(calls: int) -> None:
    class Draws(nn.Module):
        @nn.compact
        def __call__(self) -> Any:
            return [self.make_rng("a") for _ in range(3)][calls]

    class Outer(nn.Module):
        @nn.compact
        def __call__(self) -> Any:
            return Draws(name="here")()

    assert linen_key(KEY, ["here"], stream="a", calls=calls) == Outer().apply({}, rngs={"a": KEY})

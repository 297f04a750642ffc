"""Eight devices: the masks of DropConnect are those of one device, and move nothing.

More of them, and masks for each example, in `tests/layers/test_sharding.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import layers
from layers.linen import drop_params
from tests.helpers import assert_trees_close
from tests.sharding.matrix import (
    MLP,
    Native,
    Setting,
    moves,
    needs_8_devices,
    placed,
    raw,
    settings,
    unplaced,
)

pytestmark = needs_8_devices


def _linears(setting: Setting, params: Any, x: jax.Array) -> jax.Array:
    model = Native(setting, params)
    up, down = (layers.DropConnectLinear(layer, 0.5) for layer in (model.up, model.down))
    up_key, down_key = jax.random.split(setting.key())
    return down(jnp.tanh(up(x, rngs=up_key)), rngs=down_key)


def _dropped_kernels(setting: Setting, params: Any) -> Any:
    keys = dict(zip(("up", "down"), jax.random.split(setting.key()), strict=True))
    drop = lambda name: layers.drop_weight(params[name]["kernel"], keys[name], 0.5)  # noqa: E731
    return {name: {"kernel": drop(name)} for name in keys}


def _dropped_module(setting: Setting, params: Any) -> Any:
    model = layers.drop_weights(Native(setting, params), setting.key(), 0.5)
    return nnx.to_pure_dict(nnx.state(model))


# A model with masks, and the kernels that it multiplies with.
FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "DropConnectLinear": (_linears, _dropped_kernels),
    "WeightDrop": (
        lambda setting, params, x: layers.WeightDrop(Native(setting, params), 0.5)(
            x, rngs=setting.key()
        ),
        _dropped_module,
    ),
    "drop_params": (
        lambda setting, params, x: MLP(setting).apply(
            {"params": drop_params(params, setting.key(), 0.5)}, x
        ),
        lambda setting, params: drop_params(params, setting.key(), 0.5),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@settings
def test_masks_move_nothing(setting: Setting, form: str) -> None:
    model, dropped = FORMS[form]
    params, x, _ = placed(setting)
    ones = jax.tree.map(jnp.ones_like, params)
    kernels = ["down", "up"]
    masks = setting.lowered(lambda ones: dropped(setting, ones), (ones,), kernels).compile()
    masks = dict(zip(kernels, ({"kernel": mask} for mask in masks(ones)), strict=True))

    def gradients(fn: Callable[..., Any]) -> Callable[..., Any]:
        loss = lambda params, x, masks: setting.mean(fn(params, x, masks) ** 2)  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))

    def by_hand(params: Any, x: jax.Array, masks: Any) -> jax.Array:
        return raw(setting, jax.tree.map(jnp.multiply, params, masks), x)[0]

    ours = gradients(lambda params, x, masks: model(setting, params, x))
    outs = ["scalar", *kernels, "batch"]
    compiled, reference = (
        setting.lowered(fn, (params, x, masks), outs).compile() for fn in (ours, gradients(by_hand))
    )
    assert moves(compiled) == moves(reference)
    found, expected = (run(params, x, masks) for run in (compiled, reference))
    assert_trees_close(found, expected)
    assert [a.sharding for a in found] == [b.sharding for b in expected]
    # By itself each device drew its own part; otherwise the masks are those of one device.
    if setting.mode == "shard_map" and setting.layout != "data":
        assert (
            len(
                {
                    np.asarray(part.data).tobytes()
                    for part in masks["up"]["kernel"].addressable_shards
                }
            )
            > 1
        )
    else:
        one = jax.tree.map(jnp.ones_like, unplaced()[0])
        assert_trees_close(masks, dropped(Setting(), one))

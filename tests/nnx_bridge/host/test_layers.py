"""Every public layer of Linen runs as NNX with the bits that it has in Linen.

Initial variables, outputs and updates are compared without tolerance; the gradients of parameters
and inputs are the same program, equation by equation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import nnx_bridge
from nnx_bridge.host import default_mutable
from tests.helpers import assert_same_program, assert_trees_equal, normal

IMAGE, ROW, SEQUENCE = normal(2, 6, 6, 4), normal(3, 4), normal(2, 5, 4)
TOKENS = jnp.array([[0, 3, 1], [2, 2, 6]])
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1), "other": jax.random.key(2)}


class In(nn.Module):
    """A layer that another layer is given, inside of a model: its variables are the model's."""

    make: Callable[[], nn.Module]
    kwargs: Any = None

    @nn.compact
    def __call__(self, *args: Any) -> Any:
        return self.make()(*args, **(self.kwargs or {}))


def case(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[nn.Module, Any, Any]:
    return module, args, kwargs


def recurrent(cell: nn.RNNCellBase) -> tuple[nn.Module, Any, Any]:
    shape = (2, 5, 5, 3) if isinstance(cell, nn.ConvLSTMCell) else (3, 4)
    carry = cell.initialize_carry(jax.random.key(3), shape)
    return cell, (carry, normal(*shape)), {}


LAYERS = {
    "Dense": case(nn.Dense(3), ROW),
    "Dense-bfloat16": case(nn.Dense(3, dtype=jnp.bfloat16), ROW),
    "Dense-complex": case(nn.Dense(3, param_dtype=jnp.complex64), ROW + 1j * ROW),
    "Dense-no-bias": case(nn.Dense(3, use_bias=False), ROW),
    "DenseGeneral": case(nn.DenseGeneral((2, 3), axis=(-2, -1)), SEQUENCE),
    "DenseGeneral-batched": case(nn.DenseGeneral(3, batch_dims=(0,)), SEQUENCE),
    "Einsum": case(nn.Einsum((4, 2, 3), "ab,bcd->acd"), ROW),
    "Einsum-no-bias": case(nn.Einsum((4, 3), "...b,bc->...c", use_bias=False), SEQUENCE),
    "Embed": case(nn.Embed(7, 4), TOKENS),
    "Embed-half": case(nn.Embed(7, 4, dtype=jnp.float16), TOKENS),
    "Conv": case(nn.Conv(3, (3, 3)), IMAGE),
    "Conv-strided": case(nn.Conv(4, (3, 3), strides=2, padding="VALID"), IMAGE),
    "Conv-grouped": case(nn.Conv(4, (2, 2), feature_group_count=2, use_bias=False), IMAGE),
    "Conv-dilated": case(nn.Conv(2, (3,), kernel_dilation=2, padding="CAUSAL"), SEQUENCE),
    "Conv-circular": case(nn.Conv(2, (3, 3), padding="CIRCULAR"), IMAGE),
    "Conv-masked": case(nn.Conv(2, (3,), mask=jnp.ones((3, 4, 2)).at[0].set(0)), SEQUENCE),
    "ConvTranspose": case(nn.ConvTranspose(3, (3, 3), strides=(2, 2)), IMAGE),
    "ConvTranspose-kernel": case(nn.ConvTranspose(3, (2,), transpose_kernel=True), SEQUENCE),
    "ConvLocal": case(nn.ConvLocal(3, (3, 3)), IMAGE),
    "ConvLocal-valid": case(nn.ConvLocal(2, (2,), padding="VALID"), SEQUENCE),
    "BatchNorm-train": case(nn.BatchNorm(use_running_average=False), IMAGE),
    "BatchNorm-eval": case(nn.BatchNorm(), IMAGE, use_running_average=True),
    "BatchNorm-axis": case(nn.BatchNorm(axis=1, momentum=0.5), SEQUENCE, use_running_average=False),
    "LayerNorm": case(nn.LayerNorm(), ROW),
    "LayerNorm-axes": case(nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1)), SEQUENCE),
    "LayerNorm-no-scale": case(nn.LayerNorm(use_scale=False, epsilon=1e-3), ROW),
    "RMSNorm": case(nn.RMSNorm(), ROW),
    "RMSNorm-bfloat16": case(nn.RMSNorm(dtype=jnp.bfloat16), ROW),
    "GroupNorm": case(nn.GroupNorm(num_groups=2), IMAGE),
    "GroupNorm-size": case(nn.GroupNorm(num_groups=None, group_size=1), IMAGE),
    "InstanceNorm": case(nn.InstanceNorm(), IMAGE),
    "SpectralNorm": case(In(lambda: nn.SpectralNorm(nn.Dense(3)), {"update_stats": True}), ROW),
    "SpectralNorm-eval": case(
        In(lambda: nn.SpectralNorm(nn.Conv(3, (2,)), n_steps=2), {"update_stats": False}), SEQUENCE
    ),
    "WeightNorm": case(In(lambda: nn.WeightNorm(nn.Dense(3))), ROW),
    "WeightNorm-alone": case(nn.WeightNorm(nn.Dense(3), use_scale=False), ROW),
    "Dropout": case(nn.Dropout(0.5), ROW, deterministic=False),
    "Dropout-stream": case(nn.Dropout(0.5, rng_collection="other", deterministic=False), ROW),
    "Dropout-broadcast": case(nn.Dropout(0.5, broadcast_dims=(1,)), ROW, deterministic=False),
    "MultiHeadAttention": case(nn.MultiHeadAttention(2), SEQUENCE, normal(2, 3, 4)),
    "MultiHeadDotProductAttention": case(
        nn.MultiHeadDotProductAttention(2, dropout_rate=0.5), SEQUENCE, deterministic=False
    ),
    "MultiHeadDotProductAttention-normed": case(
        nn.MultiHeadDotProductAttention(2, normalize_qk=True, qkv_features=8),
        SEQUENCE,
        sow_weights=True,
    ),
    "SelfAttention": case(nn.SelfAttention(2, deterministic=True), SEQUENCE),
    "SelfAttention-cache": case(nn.SelfAttention(2, decode=True), SEQUENCE[:, :1]),
    "LSTMCell": recurrent(nn.LSTMCell(4)),
    "LSTMCell-gates": recurrent(nn.LSTMCell(4, gate_fn=nn.hard_sigmoid)),
    "OptimizedLSTMCell": recurrent(nn.OptimizedLSTMCell(4)),
    "ConvLSTMCell": recurrent(nn.ConvLSTMCell(3, (3, 3))),
    "GRUCell": recurrent(nn.GRUCell(4)),
    "MGUCell": recurrent(nn.MGUCell(4)),
    "MGUCell-full": recurrent(nn.MGUCell(4, reset_gate=False)),
    "SimpleCell": recurrent(nn.SimpleCell(4, residual=True)),
    "RNN": case(nn.RNN(nn.LSTMCell(4)), SEQUENCE),
    "RNN-lengths": case(
        nn.RNN(nn.GRUCell(4), reverse=True, keep_order=True, return_carry=True),
        SEQUENCE,
        seq_lengths=jnp.array([2, 5]),
    ),
    "RNN-in-compact": case(In(lambda: nn.RNN(nn.SimpleCell(4), time_major=True)), SEQUENCE),
    "Bidirectional": case(nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.MGUCell(3))), SEQUENCE),
    "Sequential": case(nn.Sequential([nn.Dense(3), nn.relu, nn.BatchNorm(False)]), ROW),
    "Sequential-nested": case(
        nn.Sequential([nn.Sequential([nn.Dense(2), jnp.tanh]), nn.Sequential([nn.Dense(3)])]), ROW
    ),
    "Sequential-in-compact": case(In(lambda: nn.Sequential([nn.Dense(3), nn.Dense(2)])), ROW),
    "PReLU": case(nn.PReLU(), ROW),
    "PReLU-slope": case(nn.PReLU(negative_slope_init=0.3), IMAGE),
    "Fp8DotGeneral": case(nn.Dense(16, dot_general_cls=nn.Fp8DotGeneral), normal(16, 16)),
    "Fp8DotGeneralOp": case(nn.Dense(16, dot_general_cls=nn.Fp8DotGeneralOp), normal(16, 16)),
    "Fp8DirectDotGeneralOp": case(
        nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp), normal(16, 16)
    ),
    "NANOOFp8DotGeneralOp": case(
        nn.Dense(16, dot_general_cls=nn.NANOOFp8DotGeneralOp), normal(16, 16)
    ),
    "Fp8Einsum": case(nn.Fp8Einsum(), "ab,bc->ac", normal(16, 16), normal(16, 16)),
}  # fmt: skip

# Classes to derive from: they are no layers.
BASES = {"Module", "RNNCellBase"}


@functools.cache
def initial(name: str) -> Any:
    module, args, kwargs = LAYERS[name]
    return module.init(KEYS, *args, **kwargs)


@pytest.mark.parametrize("name", LAYERS)
def test_the_hosted_layer_is_the_layer(name: str) -> None:
    module, args, kwargs = LAYERS[name]
    variables = initial(name)
    host = nnx_bridge.Host.init(module, KEYS, *args, **kwargs)
    assert_trees_equal(nnx_bridge.unhost(host)[1], variables)

    mutable = [name for name in variables if name not in ("params", "intermediates")]
    for _ in range(2):  # Statistics that the first call moves are those of the second.
        expected, updates = module.apply(variables, *args, rngs=KEYS, mutable=mutable, **kwargs)
        assert_trees_equal(host(*args, rngs=KEYS, **kwargs), expected)
        variables = {**variables, **updates}
    assert_trees_equal(nnx_bridge.unhost(host)[1], variables)
    assert type(host).__name__ == type(module).__name__
    assert nnx_bridge.unhost(host)[0] is module


def size(y: Any) -> jax.Array:
    """A real number that depends on all of ``y``."""
    return sum(jnp.sum(jnp.real(leaf * jnp.conj(leaf))) for leaf in jax.tree.leaves(y))


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradients_of_the_hosted_layer_are_those_of_the_layer(name: str) -> None:
    module, args, kwargs = LAYERS[name]
    variables = initial(name)
    mutable = default_mutable(variables)
    inexact = lambda x: jnp.issubdtype(getattr(x, "dtype", jnp.int32), jnp.inexact)  # noqa: E731
    places = [i for i, x in enumerate(args) if all(map(inexact, jax.tree.leaves(x)))]

    def loss(call: Callable[..., Any], inputs: tuple[Any, ...]) -> jax.Array:
        given = dict(zip(places, inputs, strict=True))
        return size(call(*[given.get(i, x) for i, x in enumerate(args)], rngs=KEYS, **kwargs))

    def linen(variables: Any, *inputs: Any) -> Any:
        def of_params(params: Any, *inputs: Any) -> jax.Array:
            def call(*args: Any, **kwargs: Any) -> Any:
                y = module.apply({**variables, "params": params}, *args, mutable=mutable, **kwargs)
                return y if mutable is False else y[0]

            return loss(call, inputs)

        wrt = tuple(range(len(inputs) + 1))
        return jax.grad(of_params, wrt)(variables.get("params", {}), *inputs)

    graphdef = nnx.graphdef(nnx_bridge.Host(module, variables))

    def hosted(variables: Any, *inputs: Any) -> Any:
        model = nnx.merge(graphdef, nnx_bridge.to_state(variables))
        wrt = tuple(range(len(inputs) + 1))
        return nnx.grad(lambda model, *inputs: loss(model, inputs), argnums=wrt)(model, *inputs)

    assert_same_program(hosted, linen, variables, *[args[i] for i in places])


def test_every_public_layer_is_here() -> None:
    public = {
        name
        for name, value in vars(nn).items()
        if isinstance(value, type) and issubclass(value, nn.Module)
    }
    assert public - BASES == {name.partition("-")[0] for name in LAYERS}

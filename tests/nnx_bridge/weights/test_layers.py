"""Every pair of layers of Flax converts both ways, with equal outputs, gradients and bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from nnx_bridge import WeightsError, compat, load, match
from nnx_bridge.weights._leaves import nnx_values
from tests.helpers import KEY, assert_trees_close, assert_trees_equal, normal, randomized

X = normal(2, 8)
IMAGE = normal(2, 6, 6, 8)
SEQUENCE = normal(2, 5, 8)


class Layers(NamedTuple):
    """A pair of layers, their input, and how each is called."""

    linen: nn.Module
    nnx: Callable[[nnx.Rngs], Any]
    x: jax.Array = X
    linen_kwargs: dict[str, Any] = {}
    nnx_kwargs: dict[str, Any] = {}
    # Absent in NNX: these must be zero.
    zero: tuple[str, ...] = ("no", "path")


def _attention(**kwargs: Any) -> Callable[[nnx.Rngs], Any]:
    return lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs, **kwargs)


def _rnn(cell: Any) -> Callable[[nnx.Rngs], Any]:
    return lambda rngs: nnx.RNN(cell(8, 4, rngs=rngs), rngs=rngs)


PAIRS = {
    "Dense": Layers(nn.Dense(8), lambda r: nnx.Linear(8, 8, rngs=r)),
    "DenseGeneral": Layers(
        nn.DenseGeneral((2, 3), axis=(-2, -1)),
        lambda r: nnx.LinearGeneral((6, 8), (2, 3), axis=(-2, -1), rngs=r),
        IMAGE,
    ),
    "Einsum": Layers(
        nn.Einsum((8, 2, 3), "bd,dhe->bhe"),
        lambda r: nnx.Einsum("bd,dhe->bhe", (8, 2, 3), (2, 3), rngs=r),
    ),
    "Conv": Layers(nn.Conv(4, (3, 3)), lambda r: nnx.Conv(8, 4, (3, 3), rngs=r), IMAGE),
    "ConvTranspose": Layers(
        nn.ConvTranspose(4, (3, 3)), lambda r: nnx.ConvTranspose(8, 4, (3, 3), rngs=r), IMAGE
    ),
    "Embed": Layers(nn.Embed(7, 4), lambda r: nnx.Embed(7, 4, rngs=r), jnp.array([[1, 2], [6, 0]])),
    "BatchNorm": Layers(
        nn.BatchNorm(),
        lambda r: nnx.BatchNorm(8, rngs=r),
        IMAGE,
        {"use_running_average": False},
        {"use_running_average": False},
    ),
    "LayerNorm": Layers(nn.LayerNorm(), lambda r: nnx.LayerNorm(8, rngs=r)),
    "RMSNorm": Layers(nn.RMSNorm(), lambda r: nnx.RMSNorm(8, rngs=r)),
    "GroupNorm": Layers(nn.GroupNorm(4), lambda r: nnx.GroupNorm(8, 4, rngs=r), IMAGE),
    "InstanceNorm": Layers(nn.InstanceNorm(), lambda r: nnx.InstanceNorm(8, rngs=r), IMAGE),
    "WeightNorm": Layers(
        nn.WeightNorm(nn.Dense(4)),
        lambda r: nnx.WeightNorm(nnx.Linear(8, 4, rngs=r), rngs=r),
    ),
    "SpectralNorm": Layers(
        nn.SpectralNorm(nn.Dense(4)),
        lambda r: nnx.SpectralNorm(nnx.Linear(8, 4, rngs=r), rngs=r),
        X,
        {"update_stats": True},
        {"update_stats": True},
    ),
    "MultiHeadAttention": Layers(
        nn.MultiHeadAttention(2, normalize_qk=True), _attention(normalize_qk=True), SEQUENCE
    ),
    "MultiHeadDotProductAttention": Layers(
        nn.MultiHeadDotProductAttention(2), _attention(), SEQUENCE
    ),
    "SelfAttention": Layers(nn.SelfAttention(2), _attention(), SEQUENCE),
    "LSTMCell": Layers(nn.RNN(nn.LSTMCell(4)), _rnn(nnx.LSTMCell), SEQUENCE),
    "OptimizedLSTMCell": Layers(
        nn.RNN(nn.OptimizedLSTMCell(4)), _rnn(nnx.OptimizedLSTMCell), SEQUENCE
    ),
    "LSTMCell, optimized": Layers(nn.RNN(nn.LSTMCell(4)), _rnn(nnx.OptimizedLSTMCell), SEQUENCE),
    "GRUCell": Layers(nn.RNN(nn.GRUCell(4)), _rnn(nnx.GRUCell), SEQUENCE, zero=("hn", "bias")),
    "SimpleCell": Layers(nn.RNN(nn.SimpleCell(4)), _rnn(nnx.SimpleCell), SEQUENCE),
    "Bidirectional": Layers(
        nn.Bidirectional(nn.RNN(nn.LSTMCell(4)), nn.RNN(nn.OptimizedLSTMCell(4))),
        lambda r: nnx.Bidirectional(_rnn(nnx.LSTMCell)(r), _rnn(nnx.OptimizedLSTMCell)(r), rngs=r),
        SEQUENCE,
    ),
    "Sequential": Layers(
        nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8)]),
        lambda r: nnx.Sequential(nnx.Linear(8, 8, rngs=r), nnx.relu, nnx.Linear(8, 8, rngs=r)),
    ),
    "PReLU": Layers(nn.PReLU(), lambda r: nnx.PReLU()),
}


@functools.cache
def _variables(name: str) -> Any:
    """Variables of the Linen layer, none of them zero."""
    pair = PAIRS[name]
    return randomized(jax.jit(lambda: pair.linen.init(KEY, pair.x, **pair.linen_kwargs))())


def _without(variables: Any, pair: Layers) -> Any:
    """Variables that are zero where NNX has no place for them."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0 if tuple(k.key for k in path)[-2:] == pair.zero else x, variables
    )


@pytest.mark.parametrize("name", PAIRS)
def test_the_layer_converts_with_its_outputs_and_gradients(name: str) -> None:
    pair = PAIRS[name]
    variables = _without(_variables(name), pair)
    model = pair.nnx(nnx.Rngs(5))
    plan = load(model, variables)
    stats = {name: value for name, value in variables.items() if name != "params"}

    @jax.jit
    def of_linen(params: Any) -> Any:
        def loss(params: Any) -> Any:
            mutable = ["batch_stats"]
            y, updates = pair.linen.apply(
                {"params": params, **stats}, pair.x, mutable=mutable, **pair.linen_kwargs
            )
            return jnp.sum(jnp.sin(y)), (y, updates)

        return jax.grad(loss, has_aux=True)(params)

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def of_nnx(params: Any) -> Any:
        def loss(params: Any) -> Any:
            called = nnx.merge(graphdef, params, rest, copy=True)
            y = called(pair.x, **pair.nnx_kwargs)
            return jnp.sum(jnp.sin(y)), (y, nnx.state(called, nnx.BatchStat))

        return jax.grad(loss, has_aux=True)(params)

    gradient, (y, updates) = of_linen(variables["params"])
    nnx_gradient, (nnx_y, nnx_updates) = of_nnx(params)
    assert_trees_close(nnx_y, y)
    expected = nnx_values(plan.to_nnx(_without({"params": gradient}, pair)))
    for path, array in nnx_values(nnx_gradient).items():
        assert_trees_close(array, expected[path], factor=4)
    if updates:
        moved = plan.to_linen(nnx_updates)["batch_stats"]
        assert_trees_close(moved, updates["batch_stats"])


@pytest.mark.parametrize("name", PAIRS)
def test_the_variables_come_back_to_the_bit(name: str) -> None:
    pair = PAIRS[name]
    variables = _without(_variables(name), pair)
    model = pair.nnx(nnx.Rngs(5))
    plan = load(model, variables)
    assert_trees_equal(plan.to_linen(model), variables)
    assert_trees_equal(plan.to_linen(plan.to_nnx(variables)), variables)


def test_a_gru_whose_hidden_bias_is_not_zero_is_refused() -> None:
    pair = PAIRS["GRUCell"]
    model = pair.nnx(nnx.Rngs(0))
    before = nnx.clone(model)
    variables = _variables("GRUCell")
    with pytest.raises(WeightsError, match=r"hn/bias -> nothing: expected zeros.*GRUCell of nnx"):
        load(model, variables)
    assert_trees_equal(nnx.state(model, nnx.Param), nnx.state(before, nnx.Param))


@pytest.mark.parametrize("name", ["GRUCell", "OptimizedLSTMCell", "SimpleCell"])
def test_a_cell_with_linens_parameters_takes_them_all(name: str) -> None:
    cell = getattr(compat, name)
    model = nnx.RNN(cell(8, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    variables = _variables(name)
    plan = load(model, variables)
    assert_trees_close(model(SEQUENCE), PAIRS[name].linen.apply(variables, SEQUENCE))
    assert_trees_equal(plan.to_linen(model), variables)


def test_a_gru_that_has_the_hidden_bias_takes_it() -> None:
    class WithBias(nnx.GRUCell):
        """What flax plans."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.hn_bias = nnx.Param(jnp.zeros(self.hidden_features))

    variables = _variables("GRUCell")
    model = nnx.RNN(WithBias(8, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    plan = load(model, variables)
    assert_trees_equal(model.cell.hn_bias[...], variables["params"]["cell"]["hn"]["bias"])
    assert_trees_equal(plan.to_linen(model), variables)


@pytest.mark.parametrize(
    ("linen_cls", "nnx_cls"),
    [(nn.OptimizedLSTMCell, nnx.OptimizedLSTMCell), (nn.SimpleCell, nnx.SimpleCell)],
)
def test_gates_are_found_under_any_name(linen_cls: Any, nnx_cls: Any) -> None:
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.RNN(linen_cls(4))(nn.RNN(linen_cls(8))(x))

    class Native(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.upper = nnx.RNN(nnx_cls(8, 4, rngs=rngs), rngs=rngs)
            self.lower = nnx.RNN(nnx_cls(8, 8, rngs=rngs), rngs=rngs)

    module, model = Linen(), Native(nnx.Rngs(0))
    variables = randomized(module.init(KEY, SEQUENCE))
    load(model, variables)
    y = model.upper(model.lower(SEQUENCE))
    assert_trees_close(y, module.apply(variables, SEQUENCE))


def test_a_cell_that_has_the_fused_matrices_in_linen_too_is_copied() -> None:
    class Fused(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            h = nn.Dense(16, name="dense_h")(jnp.zeros((2, 4)))
            return h + nn.Dense(16, use_bias=False, name="dense_i")(x)

    variables = Fused().init(KEY, X)
    plan = match(variables, nnx.OptimizedLSTMCell(8, 4, rngs=nnx.Rngs(0)))
    assert {str(row.layout) for row in plan.rows} == {""}
    assert not plan.problems

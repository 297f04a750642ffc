"""`cond`, `switch` and `while_loop` against Linen, or against a plain call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import core, linen, nnx
from flax.core.lift import while_loop

import lifted
import nnx_bridge as nn
from tests.helpers import assert_trees_close, assert_trees_equal, normal, strict
from tests.nnx_bridge import models
from tests.nnx_bridge.transforms.twins import NNXBlock, collections

_SPLIT = {"params": True}
X = normal(4, 3)


class LinenCounts(linen.Module):
    branches: int

    def setup(self) -> None:
        for i in range(self.branches):
            setattr(self, f"n{i}", self.variable("batch_stats", f"n{i}", lambda: jnp.array(0)))

    def __call__(self, index: Any, x: jax.Array) -> Any:
        return _choose(linen, self, index, x, self.branches)


class NNXCounts(nnx.Module):
    def __init__(self, branches: int) -> None:
        self.branches = branches
        for i in range(branches):
            setattr(self, f"n{i}", nnx.BatchStat(jnp.array(0)))

    def __call__(self, index: Any, x: jax.Array) -> Any:
        return _choose(nn, self, index, x, self.branches)


def _choose(package: Any, mdl: Any, index: Any, x: jax.Array, branches: int) -> Any:
    """Each branch writes another variable."""

    def branch(i: int) -> Any:
        def call(mdl: Any, x: jax.Array) -> jax.Array:
            count = getattr(mdl, f"n{i}")
            if isinstance(count, nnx.Variable):
                count[...] += 1
            else:
                count.value += 1
            return (i + 1) * x

        return call

    if branches == 2:
        return package.cond(index == 0, branch(0), branch(1), mdl, x)
    return package.switch(index, [branch(i) for i in range(branches)], mdl, x)


@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("compiled", [False, True])
def test_branches_that_write_different_variables(branches: int, index: int, compiled: bool) -> None:
    module, mdl = LinenCounts(branches), NNXCounts(branches)
    variables = {"batch_stats": {f"n{i}": jnp.array(0) for i in range(branches)}}
    wanted, updates = module.apply(variables, jnp.array(index), X, mutable=["batch_stats"])
    call = nnx.jit(NNXCounts.__call__) if compiled else NNXCounts.__call__
    with strict():
        y = call(mdl, jnp.array(index), X)
    assert_trees_equal(y, wanted)
    assert_trees_equal(collections(mdl), dict(updates))


@pytest.mark.parametrize("model", ["norm", "noisy", "counter", "shared", "cyclic", "containers"])
@pytest.mark.parametrize("pred", [True, False])
def test_a_branch_does_what_a_plain_call_does(model: str, pred: bool) -> None:
    mdl = models.make(models.MODELS[model])
    plain = nnx.clone(mdl)
    wanted = plain(X) if pred else 2 * plain(X)
    with strict():
        y = nn.cond(pred, lambda mdl, x: mdl(x), lambda mdl, x: 2 * mdl(x), mdl, X)
    assert_trees_close(y, wanted)
    assert_trees_close(nnx.state(mdl), nnx.state(plain))


def test_both_branches_may_record() -> None:
    def call(mdl: Any, x: jax.Array) -> Any:
        return nn.cond(True, lambda m, x: m(x), lambda m, x: m(2 * x), mdl, x)

    mdl = NNXBlock(nnx.Rngs(0))
    (_, _), recorded = nn.capture(call, nnx.Intermediate)(mdl, X)
    assert_trees_close(recorded["h"].get_value(), (mdl.dense(X),))


def test_one_branch_may_not_record() -> None:
    def call(mdl: Any, x: jax.Array) -> Any:
        return nn.cond(True, lambda m, x: m(x)[0], lambda m, x: x, mdl, x)

    with pytest.raises(ValueError, match="values recorded, in all branches or in none"):
        nn.capture(call, nnx.Intermediate)(NNXBlock(nnx.Rngs(0)), X)


def test_the_gradient_of_a_branch() -> None:
    mdl = models.make(models.MLP)

    def call(mdl: Any, x: jax.Array) -> jax.Array:
        return nn.cond(x.sum() > -1e6, lambda m, x: m(x).sum(), lambda m, x: x.sum(), mdl, x)

    grads = lifted.grad(call, mdl, X, grad_variables="params")
    assert_trees_close(grads, lifted.grad(lambda m, x: m(x).sum(), mdl, X, grad_variables="params"))


class LinenLoop(linen.Module):
    """Draws in each step, and counts."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        self.variable("batch_stats", "n", lambda: jnp.array(0))
        key = self.scope.rngs["params"].as_jax_rng()
        self.put_variable("batch_stats", "first", jax.random.key_data(key))

        def body(mdl: Any, x: jax.Array) -> jax.Array:
            mdl.put_variable("batch_stats", "n", mdl.get_variable("batch_stats", "n") + 1)
            return x + jax.random.normal(mdl.scope.rngs["params"].as_jax_rng(), x.shape)

        def goes_on(mdl: Any, x: jax.Array) -> jax.Array:
            return mdl.get_variable("batch_stats", "n") < 3

        return linen.while_loop(
            goes_on, body, self, x, carry_variables="batch_stats", split_rngs={"params": True}
        )


class NNXLoop(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rngs = rngs
        self.n = nnx.BatchStat(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        def body(mdl: Any, x: jax.Array) -> jax.Array:
            mdl.n[...] += 1
            return x + jax.random.normal(mdl.rngs.params.key[...], x.shape)

        def goes_on(mdl: Any, x: jax.Array) -> jax.Array:
            return mdl.n[...] < 3

        return nn.while_loop(
            goes_on, body, self, x, carry_variables="batch_stats", split_rngs={"params": True}
        )


def test_a_loop_draws_what_linen_draws() -> None:
    key = jax.random.key(4)
    variables = {"batch_stats": {"n": jnp.array(0), "first": jax.random.key_data(key)}}
    wanted, updates = LinenLoop().apply(variables, X, rngs={"params": key}, mutable=["batch_stats"])
    mdl = NNXLoop(nnx.Rngs(params=key))
    with strict():
        y = mdl(X)
    assert_trees_close(y, wanted)
    assert_trees_equal(mdl.n[...], updates["batch_stats"]["n"])


@pytest.mark.parametrize("split", [True, False])
def test_a_condition_draws_what_linen_draws(split: bool) -> None:
    def keep_on(key: jax.Array, n: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, 0.7) & (n < 9)

    def linen_steps(key: jax.Array) -> Any:
        scope = core.bind({}, rngs={"params": key})

        def goes_on(scope: Any, n: jax.Array) -> Any:
            return keep_on(scope.rngs["params"].as_jax_rng(), n)

        return while_loop(goes_on, lambda scope, n: n + 1, scope, 0, split_rngs={"params": split})

    def nnx_steps(key: jax.Array) -> Any:
        def goes_on(rngs: nnx.Rngs, n: jax.Array) -> Any:
            return keep_on(rngs.params.key[...], n)

        rngs = nnx.Rngs(params=key)
        return nn.while_loop(goes_on, lambda rngs, n: n + 1, rngs, 0, split_rngs={"params": split})

    keys = jax.random.split(jax.random.key(0), 8)
    assert_trees_equal(jax.vmap(nnx_steps)(keys), jax.vmap(linen_steps)(keys))


def test_a_loop_advances_streams_as_one_step_does() -> None:
    mdl = models.make(models.Noisy)

    def body(mdl: Any, carry: Any) -> Any:
        i, _ = carry
        return i + 1, mdl(X)

    def goes_on(mdl: Any, carry: Any) -> Any:
        return carry[0] < 3

    before = nnx.clone(mdl)
    _, y = nn.while_loop(goes_on, body, mdl, (0, mdl.dense(X)), split_rngs={"params": False})
    assert_trees_close(y, before(X))
    assert_trees_equal(nnx.state(mdl, nnx.RngState), nnx.state(before, nnx.RngState))


def test_a_condition_that_writes() -> None:
    def goes_on(mdl: Any, x: jax.Array) -> Any:
        return mdl(x)[1] > 0

    with pytest.raises(ValueError, match="cond_fn writes mean"):
        nn.while_loop(
            goes_on, lambda m, x: x, NNXBlock(nnx.Rngs(0)), X, carry_variables="batch_stats"
        )


@pytest.mark.parametrize("pred", [True, False])
def test_a_branch_that_writes_a_parameter(pred: bool) -> None:
    def decay(mdl: Any, x: jax.Array) -> jax.Array:
        mdl.dense.kernel[...] *= 0.5
        return mdl(x)[0]

    mdl = NNXBlock(nnx.Rngs(0))
    plain = nnx.clone(mdl)
    wanted = decay(plain, X) if pred else X
    y = nn.cond(pred, decay, lambda mdl, x: x, mdl, X)
    assert_trees_close(y, wanted)
    assert_trees_close(nnx.state(mdl), nnx.state(plain))


def _keys_of_some_steps(mdl: nnx.Rngs, number: jax.Array) -> jax.Array:
    """A key in the first step, zeros in the others."""
    return nn.cond(
        number == 0,
        lambda rngs: jax.random.key_data(rngs.params()),
        lambda rngs: jnp.zeros(2, jnp.uint32),
        mdl,
    )


def _in_turn(rngs: nnx.Rngs, carry: Any) -> Any:
    return carry[0] + 1, carry[1] + _keys_of_some_steps(rngs, carry[0])


_START = (jnp.array(0), jnp.zeros(2, jnp.uint32))


@pytest.mark.parametrize(
    "draw",
    [
        nn.scan(lambda rngs, carry: (_in_turn(rngs, carry), None), split_rngs=_SPLIT, length=3),
        nn.remat_scan(_in_turn, lengths=(2, 2)),
        nn.vmap(_keys_of_some_steps, split_rngs=_SPLIT),
        lambda rngs, carry: nn.while_loop(
            lambda rngs, carry: carry[0] < 3, _in_turn, rngs, carry, split_rngs=_SPLIT
        ),
    ],
    ids=["scan", "remat_scan", "vmap", "while_loop"],
)
def test_no_key_is_drawn_twice_where_only_some_steps_draw(draw: Any, request: Any) -> None:
    start = jnp.arange(3) if "[vmap]" in request.node.name else _START
    rngs = nnx.Rngs(params=0)
    with strict():
        first, second = (jax.tree.leaves(draw(rngs, start))[-1].ravel()[:2] for _ in range(2))
    assert first.any() and second.any()
    assert (first != second).any()
    assert rngs.params.count[...] == 2

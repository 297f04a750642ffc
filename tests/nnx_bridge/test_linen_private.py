"""What `nnx_bridge` changes in Linen does what it says, and ends with its context."""

from __future__ import annotations

import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.core import Scope
from flax.linen import transforms

from nnx_bridge._linen_private import before_jit, extra_collections, keys_from, sows_told_to
from tests.helpers import assert_trees_equal

X = jnp.ones((4, 8))
RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


def _draws(count: list[int]) -> Callable[[], jax.Array]:
    def draw() -> jax.Array:
        count.append(len(count))
        return jax.random.key(7)

    return draw


@pytest.mark.parametrize(
    ("module", "draws"),
    [
        (nn.Dropout(0.5, deterministic=False), 1),
        (nn.Sequential([nn.Dropout(0.5, deterministic=False)] * 2), 2),
        (nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=False), 1),
    ],
    ids=["Dropout", "twice", "attention"],
)
def test_layers_draw_the_given_keys(module: nn.Module, draws: int) -> None:
    variables = module.init(RNGS, X)
    count: list[int] = []
    with keys_from(_draws(count)):
        first = module.apply(variables, X, rngs=RNGS)
        second = module.apply(variables, X, rngs={**RNGS, "dropout": jax.random.key(2)})
    assert len(count) == 2 * draws
    assert_trees_equal(first, second)


def test_linen_draws_its_own_keys_again_afterwards() -> None:
    module = nn.Dropout(0.5, deterministic=False)
    expected, make_rng = module.apply({}, X, rngs=RNGS), nn.Module.make_rng
    with pytest.raises(RuntimeError, match="inside"), keys_from(_draws([])):
        raise RuntimeError("inside")
    assert nn.Module.make_rng is make_rng
    assert_trees_equal(module.apply({}, X, rngs=RNGS), expected)


def test_the_inner_context_gives_the_keys() -> None:
    outer: list[int] = []
    inner: list[int] = []
    module = nn.Dropout(0.5, deterministic=False)
    with keys_from(_draws(outer)):
        with keys_from(_draws(inner)):
            module.apply({}, X, rngs=RNGS)
        module.apply({}, X, rngs=RNGS)
    assert (outer, inner) == ([0], [0])


def test_another_thread_draws_its_own_keys() -> None:
    module, found = nn.Dropout(0.5, deterministic=False), []
    expected, count = module.apply({}, X, rngs=RNGS), []

    def run() -> None:
        found.append(module.apply({}, X, rngs=RNGS))

    with keys_from(_draws(count)):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert not count
    assert_trees_equal(found[0], expected)


class _Sowing(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow("intermediates", "twice", 2 * x)
        return x


@pytest.mark.parametrize("mutable", [False, ["intermediates"]], ids=["not kept", "kept"])
def test_what_is_sown_is_told_whether_it_is_kept_or_not(mutable: list[str] | bool) -> None:
    told: list[object] = []
    expected = _Sowing().apply({}, X, mutable=mutable)
    with sows_told_to(lambda *what: told.append(what)):
        assert_trees_equal(_Sowing().apply({}, X, mutable=mutable), expected)
    _Sowing().apply({}, X)
    ((module, name, value),) = told  # type: ignore[misc]
    assert (type(module), name) == (_Sowing, "twice")
    assert_trees_equal(value, 2 * X)


def test_a_scope_has_extra_collections_for_a_while_and_so_have_those_below() -> None:
    scope = Scope({"params": {}})
    with extra_collections(scope, {"extra": {"child": {"mark": {}}}}):
        assert scope.push("child").variables()["extra"] == {"mark": {}}
    assert "extra" not in scope.variables()


class _Compiled(nn.Module):
    """A module that `nn.jit` compiles, twice the same."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.jit(nn.Dropout)
        for _ in range(2):
            x = layer(0.5, deterministic=False)(x)
        return x


def test_what_jit_draws_for_its_module_does_not_count() -> None:
    count: list[int] = []
    with keys_from(_draws(count)):
        nn.jit(nn.Dropout)(0.5, deterministic=False).apply({}, X, rngs=RNGS)
    assert len(count) == 1


def test_every_module_that_jit_is_called_on_is_told() -> None:
    told: list[str | None] = []
    fork_rngs = transforms.fork_rngs
    with before_jit(lambda module: told.append(module.name)):
        _Compiled().apply({}, X, rngs=RNGS)
    assert told == ["JitDropout_0", "JitDropout_1"]
    assert transforms.fork_rngs is fork_rngs

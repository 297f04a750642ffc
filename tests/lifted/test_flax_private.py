"""The undocumented parts of Flax Linen that `lifted` uses do what it relies on.

A failure here means that Flax changed; what else fails then is a consequence.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.core import Scope

from lifted import _flax_private
from tests.helpers import KEY, initialized, normal
from tests.lifted import models

X = normal(4, 3)


def _bound() -> nn.Module:
    return models.Methods().bind(initialized(models.Methods(), X))


def test_module_scopes_lists_given_modules_first_and_its_own_last() -> None:
    seen = []

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> None:
            a, b = nn.Dense(2, name="a"), nn.Dense(2, name="b")
            holder = models.Holder(a, (b, a), name="holder")
            seen.extend(scope.path for scope in _flax_private.module_scopes(holder))

    Model().init(KEY, X)
    assert seen == [("a",), ("b",), ("holder",)]


def test_module_scopes_runs_a_setup_that_shares_scopes() -> None:
    class Sharing(nn.Module):
        inner: nn.Module

        def setup(self) -> None:
            nn.share_scope(self, self.inner)

    seen = []

    class Model(nn.Module):
        @nn.compact
        def __call__(self) -> None:
            module = Sharing(nn.Dense(2), name="sharing")
            seen.extend(scope.path for scope in _flax_private.module_scopes(module))

    Model().init(KEY)
    assert set(seen) == {("Dense_0",)}


def test_module_scopes_runs_no_setup_that_needs_parameters() -> None:
    class Inner(nn.Module):
        def setup(self) -> None:
            self.size = self.param("w", nn.initializers.ones, (3,)).size

    class Outer(nn.Module):
        def setup(self) -> None:
            self.inner = Inner()
            self.size = self.inner.size

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.size * x

    module = Outer().bind({"params": {"inner": {"w": jnp.ones(3)}}})
    assert _flax_private.module_scopes(module) == [module.scope]
    assert module(2) == 6  # Its own setup is yet to run.


def test_rebind_puts_a_copy_on_another_scope() -> None:
    module = _bound()
    other = jax.tree.map(jnp.zeros_like, module.variables)
    state = _flax_private.copy_state(_flax_private.export_state(module))
    copy = _flax_private.rebind(module, [Scope(other)], state)
    assert not jnp.any(copy(X))
    assert jnp.any(module(X))


def test_the_state_of_a_module_goes_to_a_copy_and_back() -> None:
    names = []

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            nn.Dense(2)(x)
            exported = _flax_private.export_state(self)
            state = _flax_private.copy_state(exported)
            copy = _flax_private.rebind(self, [self.scope.rewound()], state)
            with _flax_private.within(copy):
                names.append(nn.Dense(3).name)
            names.append(dict(exported.autoname_cursor))
            _flax_private.import_state(self, _flax_private.export_state(copy))
            names.append(nn.Dense(4).name)
            return x

    Model().init(KEY, X)
    assert names == ["Dense_1", {"Dense": 1}, "Dense_2"]


def test_within_makes_modules_submodules_of_the_module() -> None:
    parents: list[Any] = []

    class Model(nn.Module):
        @nn.compact
        def __call__(self) -> None:
            parents.append(_flax_private.current_module() is self)
            with _flax_private.within(self):
                parents.append(nn.Dense(2).parent is self)

    assert _flax_private.current_module() is None
    Model().init(KEY)
    assert parents == [True, True]


def test_within_restores_the_current_module_when_it_raises() -> None:
    module = _bound()
    with pytest.raises(ZeroDivisionError), _flax_private.within(module):
        raise ZeroDivisionError
    assert _flax_private.current_module() is None


def test_counters_of_a_pushed_scope_stand_in_those_of_its_parent() -> None:
    scope = Scope({}, rngs={"dropout": KEY})
    scope.push("inner", reuse=True).make_rng("dropout")
    nested = [value for value in scope.rng_counters.values() if isinstance(value, dict)]
    assert nested == [{"dropout": 1}]


def test_a_rewound_scope_shares_variables_and_counters() -> None:
    scope = Scope({"state": {}}, rngs={"dropout": KEY}, mutable=True)
    rewound = scope.rewound()
    rewound.put_variable("state", "x", 1)
    rewound.put_variable("other", "y", 2)
    rewound.make_rng("dropout")
    assert scope.mutable_variables() == {"state": {"x": 1}, "other": {"y": 2}}
    assert scope.rng_counters == {"dropout": 1}


def test_live_collections_are_written_in_place() -> None:
    scope = Scope({"state": {"x": 1}, "params": {"w": 2}}, mutable=["state"])
    live = _flax_private.live_collections(scope)
    scope.put_variable("state", "y", 3)
    del live["state"]["x"]
    assert set(live) == {"state"}
    assert scope.mutable_variables() == {"state": {"y": 3}}


def test_the_flag_of_init() -> None:
    seen = []
    fn = lambda mdl: seen.append(mdl.scope.get_flag("initializing", False))  # noqa: E731
    nn.init(fn, models.MLP())(KEY)
    nn.apply(fn, models.MLP())({})
    assert seen == [True, False]

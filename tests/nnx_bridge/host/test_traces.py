"""What `nn.jit` and other transforms inside of a model have traced is not taken for something else.

`nn.jit` keeps the traces of a module. A mode or a replacement that a host sets is none of what it
knows them by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import nnx_bridge
from nnx_bridge import Host
from tests.helpers import assert_trees_equal

X = jnp.float32(0)
KEY = jax.random.key(0)


class Counts(nn.Module):
    """Adds its parameter, 1, where it is in training."""

    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.param("w", nn.initializers.ones, ()) * self.train


class Pair(nn.Module):
    """Adds how many of its two parts are in training."""

    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow("intermediates", "x", {"a": x})
        return Counts(self.train, name="b")(Counts(self.train, name="a")(x))


class Method(Pair):
    """A method that is compiled."""

    __call__ = nn.jit(nn.compact(lambda self, x: Pair.__call__(self, x)))


class Step(Pair):
    """A pair as `nn.scan` takes it."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:  # type: ignore[override]
        return super().__call__(x), None


class Scanned(Pair):
    """A pair below `nn.scan`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes: Any = {"variable_axes": {True: 0}, "split_rngs": {"params": True}}
        return nn.scan(Step, length=1, **axes)(self.train, name="pair")(x)[0]


# Transformed once, and not in a call: `nn.jit` keeps the traces with the class.
CLASSES = {
    "jit": nn.jit(Pair),
    "jit of a method": Method,
    "jit of scan": nn.jit(Scanned),
    "remat": nn.remat(Pair),
    "jit of checkpoint": nn.jit(nn.checkpoint(Pair)),
}


class Model(nn.Module):
    """A pair of a class, and its mode."""

    kind: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return self.kind(train, name="pair")(x)


def hosted(kind: Any) -> Host:
    return Host.init(Model(kind), KEY, X)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("wrap", [lambda call: call, nnx.jit], ids=["eager", "nnx.jit"])
def test_each_call_runs_in_the_modes_of_the_nodes(name: str, wrap: Callable[..., Any]) -> None:
    model = hosted(CLASSES[name])
    call = wrap(lambda model: model(X))
    pair = model.pair.pair if name == "jit of scan" else model.pair
    steps = [
        (model.eval, 0), (pair.a.train, 1), (pair.a.eval, 0), (pair.b.train, 1), (pair.a.train, 2),
        (model.pair.eval, 0), (model.train, 2), (pair.b.eval, 1), (model.pair.train, 2),
    ]  # fmt: skip
    for change, count in steps:
        change()
        assert call(model) == count


class Native(nnx.Module):
    """Has the variables of `Counts`, or of a pair, and adds more."""

    def __init__(self, adds: float, depth: int = 0) -> None:
        self.adds = adds
        if depth:
            self.a, self.b = Native(adds), Native(adds)
        else:
            self.w = nnx.Param(jnp.float32(1))

    def __call__(self, x: jax.Array, *_: Any) -> Any:
        return self.b(self.a(x)) if hasattr(self, "a") else x + self.adds * self.w


@pytest.mark.parametrize("name", ["jit", "jit of a method", "jit of checkpoint"])
def test_a_replacement_with_equal_variables_runs(name: str) -> None:
    model = hosted(CLASSES[name])
    linen = Model(CLASSES[name])
    variables = nnx_bridge.unhost(model)[1]
    assert model(X) == 0
    model.pair.a = Native(10)
    assert model(X) == 10
    assert nnx_bridge.unhost(model)[0].apply(variables, X) == 10
    model.pair.a = Native(20)
    assert model(X) == 20
    assert linen.apply(variables, X) == 0
    model.pair = Native(3, depth=1)
    assert model(X) == 6


def test_what_a_replacement_holds_beside_variables_is_in_its_trace() -> None:
    class Holds(Native):
        def __call__(self, x: jax.Array, *_: Any) -> Any:
            return super().__call__(x) + self.bare

    model = hosted(CLASSES["jit"])
    model.pair.a = Holds(0)
    for value in (1, 2):
        model.pair.a.bare = nnx.data(jnp.float32(value))
        assert model(X) == value


def test_the_modules_below_are_known_though_they_were_traced_before() -> None:
    linen = Model(nn.jit(Pair))
    variables = linen.init(KEY, X)
    linen.apply(variables, X)
    for model in (Host.init(linen, KEY, X), Host(linen, variables)):
        model(X)
        assert model.pair.a.train is not None and model.pair.a(X) == 0


class Sisters(nn.Module):
    """Modules that are equal to `nn.jit`: it runs the second one by the trace of the first."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for name in ("first", "second", "third"):
            x = CLASSES["jit"](train, name=name)(x)
        return x


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_one_of_several_equal_modules_is_changed(name: str) -> None:
    model = Host.init(Sisters(), KEY, X)
    assert model(X) == 0
    model.eval()
    model[name].train()
    assert model(X) == 2
    model[name].a.eval()
    assert model(X) == 1 and "nnx_bridge" not in nnx_bridge.unhost(model)[1]
    model(X, mutable=True)
    assert set(nnx_bridge.unhost(model)[1]) <= {"params", "intermediates"}
    model.eval()
    model[name].b = Native(10)
    assert model(X) == 10
    assert model[name].a.train is not None
    linen, variables = nnx_bridge.unhost(model)
    assert linen.apply(variables, X) == linen.apply(variables, X, mutable=True)[0] == 10
    assert_trees_equal(linen.init(KEY, X), {"params": variables["params"]})


def test_sown_dictionaries_are_values_though_they_were_traced_before() -> None:
    model = hosted(CLASSES["jit"])
    for _ in range(2):
        _, sown = nnx_bridge.capture(model, nnx.Intermediate)(X)
        assert nnx.to_pure_dict(sown) == {"pair": {"x": ({"a": X},)}}


def test_a_model_that_is_applied_inside_is_another_one() -> None:
    class Applies(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            y = Counts(True, name="a")(x)
            return y + 10 * Pair(True).apply({"params": other}, x)

    other = {"a": {"w": 1.0}, "b": {"w": 1.0}}
    model = Host.init(Applies(), KEY, X)
    assert model(X) == 21
    assert model.a(X) == 1 and not hasattr(model, "b")
    model.a.eval()
    assert model(X) == 20
    model.a = Native(5)
    assert model(X) == 25


def twins(variables: Any, names: str = "ab") -> Host:
    """A model of parts that are equal for `nn.jit` with a filter of variables."""
    part = nn.jit(Counts, variables=variables)

    class Parts(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for name in names:
                x = part(False, name=name)(x)
            return x

    return Host.init(Parts(), KEY, X)


HIDDEN = "a: nn.jit would take a trace of this module for b, too, since its filter of variables"


@pytest.mark.parametrize("changed", ["a", "b"])
def test_a_filter_of_jit_that_hides_modes_of_equal_modules_is_an_error(changed: str) -> None:
    model = twins("params")
    assert model(X) == 0
    getattr(model, changed).train()
    with pytest.raises(ValueError, match=HIDDEN):
        model(X)
    model.train()
    model.a.train()
    model.b.train()
    assert model(X) == 2


def test_a_filter_of_jit_that_hides_replacements_of_equal_modules_is_an_error() -> None:
    model = twins("params")
    model.b = Native(10)
    with pytest.raises(ValueError, match=HIDDEN):
        model(X)
    module, variables = nnx_bridge.unhost(model)
    with pytest.raises(ValueError, match=HIDDEN):
        module.apply(variables, X)


@pytest.mark.parametrize("variables", [True, ["params", "nnx_bridge"]])
def test_a_filter_of_jit_with_the_collection_of_marks_tells_equal_modules_apart(
    variables: Any,
) -> None:
    model = twins(variables)
    model.b.train()
    assert model(X) == 1
    model.a = Native(10)
    assert model(X) == 11
    module, variables = nnx_bridge.unhost(model)
    assert module.apply(variables, X) == 10


def test_a_filter_of_jit_around_a_module_without_an_equal_one_is_none() -> None:
    model = twins("params", names="a")
    model.a.train()
    assert model(X) == 1

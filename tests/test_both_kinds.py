"""A model written twice, in Linen and in NNX, with the same weights: the same call of a transform
gives the same results, and variable gradients that are equal through the map of collections."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import lifted
from nnx_bridge import to_variables
from tests.helpers import assert_trees_close, assert_trees_equal, call, normal, normal_like, total
from tests.nnx_bridge import models as native_models

X = normal(4, 3)


class MLP(nn.Module):
    def setup(self) -> None:
        self.first = nn.Dense(3)
        self.second = nn.Dense(2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jnp.tanh(self.first(x)))


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(3, name="dense")(x)
        x = nn.BatchNorm(use_running_average=False, name="norm")(x)
        return nn.Dense(2, name="out")(jnp.tanh(x))


class Twice(nn.Module):
    """One submodule is called twice."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.Dense(3, name="dense")
        return dense(jnp.tanh(dense(x)))


class NativeTwice(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(jnp.tanh(self.dense(x)))


class Counter(nn.Module):
    """Writes an integer and a mean."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        count = self.variable("state", "count", lambda: jnp.int32(0))
        mean = self.variable("state", "mean", lambda: jnp.float32(0.5))
        count.value += 1
        mean.value = 0.9 * mean.value + 0.1 * x.mean()
        return nn.Dense(2, name="dense")(x) * mean.value + count.value


class State(nnx.Variable[Any]):
    pass


nnx.register_variable_name("state", State, overwrite=True)


class NativeCounter(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 2, rngs=rngs)
        self.count = State(jnp.int32(0))
        self.mean = State(jnp.float32(0.5))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.count[...] += 1
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean()
        return self.dense(x) * self.mean[...] + self.count[...]


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(4, name="embed")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm")(x))
        return nn.Dense(2, name="out")(nn.gelu(x))


class NativeAttention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        return self.out(nnx.gelu(x + self.attention(self.norm(x))))


@dataclasses.dataclass(frozen=True)
class Twins:
    linen: nn.Module
    native: type[Any]
    mutable: tuple[str, ...] = ()

    def make(self, kind: str) -> Any:
        """A new module of one kind; those of both kinds have the same variables."""
        mdl = native_models.make(self.native)
        if kind == "nnx":
            return mdl
        return self.linen.bind(to_variables(nnx.state(mdl)), mutable=list(self.mutable))


TWINS = {
    "mlp": Twins(MLP(), native_models.MLP),
    "batch_norm": Twins(Norm(), native_models.Norm, ("batch_stats",)),
    "twice": Twins(Twice(), NativeTwice),
    "counter": Twins(Counter(), NativeCounter, ("state",)),
    "attention": Twins(Attention(), NativeAttention),
}


def variables_of(mdl: Any) -> Any:
    return to_variables(nnx.state(mdl)) if isinstance(mdl, nnx.Module) else dict(mdl.variables)


def as_collections(tree: Any) -> Any:
    """Results in which what stands in an `nnx.State` stands in collections, as in Linen."""
    is_state = lambda x: isinstance(x, nnx.State)  # noqa: E731
    return jax.tree.map(lambda x: to_variables(x) if is_state(x) else x, tree, is_leaf=is_state)


def vector(mdl: Any, x: jax.Array) -> jax.Array:
    return mdl(x).reshape(-1)[:2]


def _vjp(mdl: Any, x: jax.Array) -> Any:
    y, bwd = lifted.vjp(call, mdl, x)
    return y, bwd(y)


def _tangents(mdl: Any) -> Any:
    """Tangents of a part of the parameters: of the first submodule only."""
    params = variables_of(mdl)["params"]
    first = min(params)
    return {"params": {first: normal_like(params[first])}}


def _jvp(mdl: Any, x: jax.Array) -> Any:
    return lifted.jvp(call, mdl, (x,), (normal_like(x),), _tangents(mdl))


def _linearize(mdl: Any, x: jax.Array) -> Any:
    y, f_jvp = lifted.linearize(call, mdl, x, grad_variables="params")
    return y, f_jvp(_tangents(mdl), None)


CALLS: dict[str, Callable[[Any, jax.Array], Any]] = {
    "grad": lambda mdl, x: lifted.grad(total, mdl, x, grad_variables="params"),
    "grad of everything": lambda mdl, x: lifted.grad(total, mdl, x, grad_variables=True)[1],
    "value_and_grad": lambda mdl, x: lifted.value_and_grad(total, mdl, x),
    "vjp": _vjp,
    "jvp": _jvp,
    "linearize": _linearize,
    "jacfwd": lambda mdl, x: lifted.jacfwd(vector, mdl, x),
    "jacrev": lambda mdl, x: lifted.jacrev(vector, mdl, x, grad_variables="params")[0],
    "hessian": lambda mdl, x: lifted.hessian(total, mdl, x),
    "hvp": lambda mdl, x: lifted.hvp(
        total, mdl, (x,), (x,), _tangents(mdl), grad_variables="params"
    ),
    "forward over reverse": lambda mdl, x: lifted.jvp(
        lambda m, x: lifted.grad(total, m, x)[0], mdl, (x,), (x,), {}
    ),
}


# An eager call of attention compiles many small programs.
CASES = [(m, c) for m in TWINS for c in CALLS if m != "attention" or c in ("grad", "jvp")]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_the_same_call_gives_the_same_results(model: str, name: str) -> None:
    results, variables = [], []
    for kind in ("linen", "nnx"):
        mdl = TWINS[model].make(kind)
        results.append(as_collections(CALLS[name](mdl, X)))
        variables.append(variables_of(mdl))
    # The programs of attention differ: NNX calls jax.nn.dot_product_attention.
    same = assert_trees_close if model in ("attention", "batch_norm") else assert_trees_equal
    kwargs = {"factor": 8} if same is assert_trees_close else {}
    if name == "jacrev":
        results = [jax.tree.leaves(r) for r in results]
    same(results[1], results[0], **kwargs)
    same(variables[1], variables[0], **kwargs)


def test_tangents_of_written_variables() -> None:
    """`nnx.BatchNorm` stops the gradients of its statistics, Linen's does not; so not of these."""
    dots = []
    for kind in ("linen", "nnx"):
        mdl = TWINS["counter"].make(kind)
        result = lifted.jvp(call, mdl, (X,), (X,), {}, return_variable_tangents=True)
        dots.append(as_collections(result[2]))
    assert_trees_equal(dots[1], dots[0])


SMALL = [name for name in TWINS if name != "attention"]


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("model", SMALL)
def test_reverse_mode_is_the_transpose_of_forward_mode(model: str, kind: str) -> None:
    mdl = TWINS[model].make(kind)
    t_x, u = normal_like(X, 5), normal_like(mdl(X), 6)
    _, y_dot = lifted.jvp(call, TWINS[model].make(kind), (X,), (t_x,), {})
    _, bwd = lifted.vjp(call, TWINS[model].make(kind), X)
    assert_trees_close(jnp.vdot(u, y_dot), jnp.vdot(bwd(u)[1], t_x), factor=16)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("model", SMALL)
def test_the_tangent_is_linear(model: str, kind: str) -> None:
    def dot(t_x: Any, scale: float) -> Any:
        mdl = TWINS[model].make(kind)
        tangents = jax.tree.map(lambda t: scale * t, _tangents(mdl))
        return lifted.jvp(call, mdl, (X,), (t_x,), tangents)[1]

    assert_trees_close(dot(2 * X, 2.0), 2 * dot(X, 1.0), factor=8)
    assert_trees_close(dot(X, 1.0), dot(X, 0.0) + dot(None, 1.0), factor=8)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("model", SMALL)
def test_the_gradient_is_that_of_finite_differences(model: str, kind: str) -> None:
    mdl = TWINS[model].make(kind)
    (grad,) = lifted.grad(total, mdl, X)
    t_x, step = normal_like(X, 5), 1e-2
    ends = [total(TWINS[model].make(kind), X + s * step * t_x) for s in (1, -1)]
    assert jnp.allclose(jnp.vdot(grad, t_x), (ends[0] - ends[1]) / (2 * step), rtol=2e-2, atol=2e-2)

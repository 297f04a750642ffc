"""Small models in two forms: the same code with another import, and modules to lift, in Linen and
NNX, with equal names of Variables."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen, nnx

import lifted
import nnx_bridge
from tests.helpers import initialized

WIDTH = 3


def with_derivative(mdl: Any, x: jax.Array, inner: str) -> Any:
    """The output and a derivative of it: a transform of ours inside of what is lifted."""
    if inner == "jvp":
        return lifted.jvp(lambda mdl, x: mdl(x), mdl, (x,), (jnp.ones_like(x),), {})
    (gradient,) = lifted.grad(lambda mdl, x: mdl(x).sum(), mdl, x)
    return mdl(x), gradient


class LinenBlock(linen.Module):
    """Parameters, statistics that it writes, and values that it sows."""

    inner: ClassVar = "jvp"

    @linen.compact
    def __call__(self, x: jax.Array, scale: Any = None) -> tuple[jax.Array, jax.Array]:
        h, h_dot = with_derivative(linen.Dense(WIDTH, name="dense"), x, self.inner)
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(WIDTH))
        if not self.is_initializing():
            mean.value = 0.5 * mean.value + 0.5 * h.mean(tuple(range(h.ndim - 1)))
        self.sow("intermediates", "h", h)
        y = jnp.tanh(h + mean.value) * h_dot * (1.0 if scale is None else scale)
        return y, y.sum()


class NNXBlock(nnx.Module):
    inner: ClassVar = "jvp"

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.mean = nnx.BatchStat(jnp.zeros(WIDTH))

    def __call__(self, x: jax.Array, scale: Any = None) -> tuple[jax.Array, jax.Array]:
        h, h_dot = with_derivative(self.dense, x, self.inner)
        self.mean[...] = 0.5 * self.mean[...] + 0.5 * h.mean(tuple(range(h.ndim - 1)))
        if hasattr(self, "__captures__"):
            self.sow(nnx.Intermediate, "h", h)
        y = jnp.tanh(h + self.mean[...]) * h_dot * (1.0 if scale is None else scale)
        return y, y.sum()


class LinenGradient(LinenBlock):
    inner: ClassVar = "grad"


class NNXGradient(NNXBlock):
    inner: ClassVar = "grad"


class LinenDraws(linen.Module):
    """Returns the key data of its stream, as the lifted function finds it."""

    def __call__(self, carry: Any, _: Any = None) -> Any:
        return carry, jax.random.key_data(self.scope.rngs["params"].as_jax_rng())


def nnx_draws(rngs: nnx.Rngs, carry: Any, _: Any = None) -> Any:
    return carry, jax.random.key_data(rngs.params.key[...])


def carried_over(mdl: Any, variables: Any) -> Any:
    """``mdl`` with the values of Linen ``variables``."""
    nnx.update(mdl, nnx_bridge.to_state(variables))
    return mdl


def pair(module: linen.Module, mdl: Any, *args: Any) -> tuple[Any, Any]:
    """Linen variables, none of them zero, and the NNX twin with the same ones."""
    variables = {k: v for k, v in initialized(module, *args).items() if k != "intermediates"}
    return variables, carried_over(mdl, variables)


def collections(mdl: Any) -> dict[str, Any]:
    """The Variables of an NNX module as Linen collections, without RNG state."""
    return nnx_bridge.to_variables(nnx.state(mdl, nnx.Not(nnx.RngState)))


def linen_gradient(module: linen.Module, variables: Any, x: jax.Array, *args: Any) -> Any:
    rest = {k: v for k, v in variables.items() if k != "params"}

    def loss(params: Any, x: jax.Array) -> jax.Array:
        out, _ = module.apply({"params": params, **rest}, x, *args, mutable=["batch_stats"])
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(out))

    return jax.grad(loss, argnums=(0, 1))(variables["params"], x)


def nnx_gradient(mdl: Any, x: jax.Array, *args: Any) -> Any:
    def loss(mdl: Any, x: jax.Array) -> jax.Array:
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(mdl(x, *args)))

    grads, t_x = lifted.grad(loss, mdl, x, grad_variables="params")
    return nnx_bridge.to_variables(grads)["params"], t_x


def linen_tangent(module: linen.Module, variables: Any, x: jax.Array, *args: Any) -> Any:
    def call(x: jax.Array) -> Any:
        return module.apply(variables, x, *args, mutable=["batch_stats"])[0]

    return jax.jvp(call, (x,), (jnp.cos(x),))


def nnx_tangent(mdl: Any, x: jax.Array, *args: Any) -> Any:
    return lifted.jvp(lambda mdl, x: mdl(x, *args), mdl, (x,), (jnp.cos(x),), {})

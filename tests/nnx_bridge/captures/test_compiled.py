"""Linen modules under `nn.jit` are captured whatever traces there are of them."""

import jax
import jax.numpy as jnp
from flax import linen as nn

import nnx_bridge


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.tanh(nn.Dense(3, name="dense")(x))


CompiledInner = nn.jit(Inner)


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return CompiledInner(name="inner")(x).sum()


def test_outputs_of_a_compiled_module_are_sown_after_a_call_without() -> None:
    x = jnp.ones((2, 3))
    mdl = Outer().bind(Outer().init(jax.random.key(0), x))
    fn = lambda mdl, x: mdl(x)  # noqa: E731
    bare = nnx_bridge.capture_grad(fn, mdl, x)
    full = nnx_bridge.capture_grad(fn, mdl, x, capture_intermediates=True)
    assert not bare.intermediates
    assert "dense" in full.intermediates["inner"]
    assert not nnx_bridge.capture_grad(fn, mdl, x).intermediates

"""The smallest thing to check: a Linen network with statistics and dropout.

flaxlift check examples.small_model:mlp
"""

import jax
from flax import linen as nn

import nnx_bridge


class MLP(nn.Module):
    """Two dense layers with batch statistics and dropout between them."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(self.features)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
        return nn.Dense(1)(x)


def mlp() -> nnx_bridge.Case:
    """The network in training mode, on random inputs."""
    x = jax.random.normal(jax.random.key(1), (16, 8))
    return nnx_bridge.Case(MLP(32), (x,), {"train": True})

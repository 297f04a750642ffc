"""Attention maps and their gradients, by one call, from a Linen model and from its host in NNX.

Relevance of an attention map is the map times the gradient of the score with respect to it (Chefer
et al., "Transformer Interpretability Beyond Attention Visualization", CVPR 2021). The model marks
its maps with `perturb` and sows them; `nnx_bridge.capture_grad` returns both for all layers from
one forward and one backward pass, the same trees for Linen and for NNX.

    python examples/attention_gradients.py
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import nnx_bridge

WIDTH, HEADS, LAYERS, LENGTH = 32, 4, 2, 10


class Attention(nn.Module):
    """Self-attention that shows its maps."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (nn.DenseGeneral((HEADS, WIDTH // HEADS), name=name)(x) for name in "qkv")
        maps = nn.softmax(jnp.einsum("...qhd,...khd->...hqk", q, k) / (WIDTH // HEADS) ** 0.5)
        self.sow("intermediates", "map", maps)
        maps = self.perturb("map_gradient", maps)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1))(jnp.einsum("...hqk,...khd->...qhd", maps, v))


class Classifier(nn.Module):
    """A small transformer."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(50, WIDTH)(tokens)
        for _ in range(LAYERS):
            x = x + Attention()(nn.LayerNorm()(x))
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(2)(x.mean(-2))


def relevance(model: Any, tokens: jax.Array) -> dict[str, jax.Array]:
    """For each layer how much each token matters to each other, of shape (tokens, tokens)."""
    result = nnx_bridge.capture_grad(
        lambda model, tokens: model(tokens)[0, 1], model, tokens, grad_variables=False, argnums=()
    )
    maps, gradients = (
        nnx_bridge.to_variables(tree) if isinstance(tree, nnx.State) else tree
        for tree in (result.intermediates, result.intermediate_grads)
    )
    maps, gradients = maps.get("intermediates", maps), gradients.get("perturbations", gradients)
    return {
        layer: nn.relu(gradients[layer]["map_gradient"] * maps[layer]["map"][0]).mean((0, 1))
        for layer in maps
    }


def main() -> dict[str, jax.Array]:
    """Prints and returns the relevance of each layer."""
    tokens = jax.random.randint(jax.random.key(1), (1, LENGTH), 0, 50)
    module = Classifier()
    variables = jax.jit(module.init)(jax.random.key(0), tokens)
    linen = relevance(module.bind({"params": variables["params"]}), tokens)
    hosted = relevance(nnx_bridge.Host(module, {"params": variables["params"]}), tokens)
    for layer, scores in linen.items():
        assert jnp.array_equal(scores, hosted[layer]), layer
        print(f"{layer}: token {scores.sum(0).argmax()} of {LENGTH} matters most")
    return linen


if __name__ == "__main__":
    main()

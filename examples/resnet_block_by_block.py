"""A Linen ResNet becomes an NNX ResNet, one block after the other, while it trains.

The Linen model is hosted. Between rounds of training one more block is rewritten in NNX, takes the
weights and statistics of the block that it replaces, and is compared with it before it takes its
place. At the end nothing of Linen's blocks is left, and the losses are those of the Linen model
that was never touched.

    python examples/resnet_block_by_block.py
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx
from sklearn.datasets import load_digits

import nnx_bridge

BLOCKS, STEPS, BATCH = 3, 5, 64


class LinenBlock(nn.Module):
    """Two convolutions around which the input is carried."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        h = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        h = nn.relu(nn.BatchNorm(use_running_average=not train)(h))
        h = nn.Conv(self.width, (3, 3), use_bias=False)(h)
        return nn.relu(x + nn.BatchNorm(use_running_average=not train)(h))


class LinenResNet(nn.Module):
    """A small ResNet."""

    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(self.width, (3, 3), name="stem")(x)
        for i in range(BLOCKS):
            x = LinenBlock(self.width, name=f"block{i}")(x, train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class Block(nnx.Module):
    """The same block in NNX."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        def conv() -> nnx.Conv:
            return nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)

        self.conv1, self.norm1 = conv(), nnx.BatchNorm(width, rngs=rngs)
        self.conv2, self.norm2 = conv(), nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        h = nnx.relu(self.norm1(self.conv1(x), use_running_average=not train))
        return nnx.relu(x + self.norm2(self.conv2(h), use_running_average=not train))


# Linen numbers layers by kind, the rewrite names them: said once, for all blocks.
RULES = [
    (f"{kind}_{i}", f"{name}{i + 1}")
    for kind, name in (("Conv", "conv"), ("BatchNorm", "norm"))
    for i in range(2)
]


def rewritten(model: nnx_bridge.Host, name: str) -> Block:
    """The NNX block with the weights of a hosted one; `load` compares what the two compute."""
    old = getattr(model, name)
    variables = nnx_bridge.to_variables(nnx.state(old))
    new, x = Block(old.width, nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (2, 8, 8, 16))
    calls = (lambda v: LinenBlock(old.width).apply(v, x), lambda block: block(x))
    nnx_bridge.load(new, variables, rules=RULES, calls=calls)
    return new


def trainer(tx: optax.GradientTransformation) -> Callable[..., jax.Array]:
    """A step of training, for any module."""

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            logits = model(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    return step


def main(steps: int = STEPS) -> list[tuple[float, float]]:
    """Trains the model that is moved and the one that stays; prints and returns their losses."""
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16.0, jnp.float32), jnp.array(labels)
    moved, stays = (
        nnx_bridge.Host.init(LinenResNet(), jax.random.key(0), images[:2]) for _ in range(2)
    )
    tx = optax.sgd(0.05)
    step, losses = trainer(tx), []
    for round_ in range(BLOCKS + 1):
        if round_:
            name = f"block{round_ - 1}"
            setattr(moved, name, rewritten(moved, name))
        both = []
        for model in (moved, stays):
            model.train()
            optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
            for i in range(steps):
                batch = slice(i * BATCH, (i + 1) * BATCH)
                value = step(model, optimizer, images[batch], labels[batch])
            both.append(float(value))
        losses.append((both[0], both[1]))
        native = sum(isinstance(getattr(moved, f"block{i}"), Block) for i in range(BLOCKS))
        print(f"{native} of {BLOCKS} blocks in NNX: loss {both[0]:.6f}, in Linen {both[1]:.6f}")
    return losses


if __name__ == "__main__":
    main()

"""A Linen classifier, its native NNX rewrite, and training loops that do the same on both sides."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

from nnx_bridge import Host, linen_rngs

KEY = jax.random.key(11)
DECAY = 0.9


class Classifier(nn.Module):
    """Convolution, statistics and Dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(3, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.relu(x).reshape(len(x), -1)
        x = nn.Dropout(0.4, deterministic=not train)(x)
        return nn.Dense(4)(x)


class Native(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.Conv_0 = nnx.Conv(1, 3, (3, 3), rngs=rngs)
        self.BatchNorm_0 = nnx.BatchNorm(3, rngs=rngs)
        self.Dropout_0 = nnx.Dropout(0.4, rngs=rngs)
        self.Dense_0 = nnx.Linear(48, 4, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = self.Conv_0(x)
        x = self.BatchNorm_0(x, use_running_average=not train)
        x = nnx.relu(x).reshape(len(x), -1)
        x = self.Dropout_0(x, deterministic=not train)
        return self.Dense_0(x)


class State(TrainState):
    """What the Linen run keeps."""

    batch_stats: Any
    ema_params: Any
    dropout_key: jax.Array


def batch(step: int) -> tuple[jax.Array, jax.Array]:
    """The data of a step."""
    key = jax.random.fold_in(KEY, 100 + step)
    return jax.random.normal(key, (6, 4, 4, 1)), jax.random.randint(key, (6,), 0, 4)


def not_vectors(params: Any) -> Any:
    """The weight-decay mask."""
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)


def transformation() -> optax.GradientTransformation:
    """Adam with a weight-decay mask and a learning-rate schedule, behind a clip."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-2, 3, 20)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1, mask=not_vectors)
    )


def initial(tx: optax.GradientTransformation | None = None) -> State:
    """The start of a Linen run."""
    model = Classifier()
    variables = model.init(KEY, batch(0)[0], train=False)
    return State.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=tx or transformation(),
        batch_stats=variables["batch_stats"],
        ema_params=jax.tree.map(jnp.copy, variables["params"]),
        dropout_key=jax.random.key(5),
    )


def _average(average: Any, new: Any) -> Any:
    return jax.tree.map(lambda a, b: DECAY * a + (1 - DECAY) * b, average, new)


def _loss(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def linen_step(state: State, x: jax.Array, y: jax.Array) -> tuple[State, jax.Array]:
    """One step of the Linen run."""
    key = jax.random.fold_in(state.dropout_key, state.step)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(
            variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return _loss(logits, y), updates

    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])
    return state.replace(ema_params=_average(state.ema_params, state.params)), value


def nnx_optimizer(model: nnx.Module, tx: optax.GradientTransformation | None = None) -> Any:
    """The optimizer of the NNX run."""
    return nnx.Optimizer(model, tx or transformation(), wrt=nnx.Param)


@nnx.jit
def nnx_step(
    model: Any, optimizer: Any, average: Any, key: jax.Array, x: jax.Array, y: jax.Array
) -> tuple[Any, jax.Array]:
    """One step of the NNX run: the average of the parameters, and the loss."""
    key = jax.random.fold_in(key, optimizer.step[...])

    def loss(model: Any) -> jax.Array:
        if isinstance(model, Host):
            return _loss(model(x, train=True, rngs={"dropout": key}), y)
        with linen_rngs(model, {"dropout": key}):
            return _loss(model(x, train=True), y)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return _average(average, nnx.to_pure_dict(nnx.state(model, nnx.Param))), value


def native() -> Native:
    """A rewrite with weights of its own."""
    return Native(nnx.Rngs(99))


def host() -> Host:
    """A host with weights of its own."""
    x, _ = batch(0)
    return Host(Classifier(), Classifier().init(jax.random.key(77), x, train=False))

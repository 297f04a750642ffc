"""The whole way of a Linen model to NNX, on real data.

A Linen classifier learns scikit-learn's digits for some epochs and is saved with Orbax. An audit
lists what the move takes; the checkpoint is converted, a native NNX rewrite and a host are filled
from it, and training goes on in Linen and in both side by side. An HTML report shows the loss
curves, which lie on each other.

    python examples/digits_migration.py --out build/digits_migration
"""

import argparse
import base64
import io
import pathlib
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import nnx_bridge
from nnx_bridge.cli._app import app

BATCH, EPOCHS_BEFORE, EPOCHS_AFTER, SEED = 64, 4, 4, 0
console = Console()


class Classifier(nn.Module):
    """The model in Linen."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(16, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.Dropout(0.3, deterministic=not train)(x.reshape(len(x), -1))
        x = nn.relu(nn.Dense(64)(x))
        x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.Dense(10)(x)


class NativeClassifier(nnx.Module):
    """The same model, rewritten for NNX by hand."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.Conv_0 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.BatchNorm_0 = nnx.BatchNorm(16, rngs=rngs)
        self.Conv_1 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.Dropout_0 = nnx.Dropout(0.3, rngs=rngs)
        self.Dense_0 = nnx.Linear(512, 64, rngs=rngs)
        self.Dropout_1 = nnx.Dropout(0.3, rngs=rngs)
        self.Dense_1 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = self.Conv_0(x)
        x = nnx.relu(self.BatchNorm_0(x, use_running_average=not train))
        x = nnx.max_pool(x, (2, 2), (2, 2))
        x = nnx.relu(self.Conv_1(x))
        x = self.Dropout_0(x.reshape(len(x), -1), deterministic=not train)
        x = nnx.relu(self.Dense_0(x))
        x = self.Dropout_1(x, deterministic=not train)
        return self.Dense_1(x)


class State(TrainState):
    """What the Linen run keeps, and saves."""

    batch_stats: Any
    dropout_key: jax.Array


def optimizer(steps: int) -> optax.GradientTransformation:
    """Adam with a schedule, and weight decay for matrices alone."""

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)

    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)
    return optax.adamw(schedule, weight_decay=1e-3, mask=matrices)


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def linen_step(state: State, x: jax.Array, y: jax.Array) -> tuple[State, jax.Array]:
    """One step of training in Linen."""
    key = jax.random.fold_in(state.dropout_key, state.step)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(
            variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return cross_entropy(logits, y), updates

    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"]), value


@nnx.jit
def nnx_step(
    model: Any, optimizer: nnx.Optimizer, key: jax.Array, x: jax.Array, y: jax.Array
) -> jax.Array:
    """One step of training in NNX, native or hosted."""
    key = jax.random.fold_in(key, optimizer.step[...])

    def loss(model: Any) -> jax.Array:
        if isinstance(model, nnx_bridge.Host):
            return cross_entropy(model(x, train=True, rngs={"dropout": key}), y)
        with nnx_bridge.linen_rngs(model, {"dropout": key}):
            return cross_entropy(model(x, train=True), y)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def batches(x: np.ndarray, y: np.ndarray, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The batches of an epoch, in the same order for all."""
    order = np.random.default_rng(SEED + epoch).permutation(len(x))
    for rows in order[: len(x) // BATCH * BATCH].reshape(-1, BATCH):
        yield x[rows], y[rows]


def flaxlift(*arguments: object) -> None:
    """Runs the command, and shows what a user would type."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n[bold]$ flaxlift {shlex.join(words)}[/bold]", highlight=False)
    if app(words, standalone_mode=False):
        raise SystemExit(f"flaxlift {words[0]} failed")


def main(out: pathlib.Path, before: int = EPOCHS_BEFORE, after: int = EPOCHS_AFTER) -> pathlib.Path:
    """Runs it all; returns the report."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    x, x_test, y, y_test = train_test_split(images, labels, random_state=SEED, stratify=labels)
    tx = optimizer((before + after) * (len(x) // BATCH))

    # Linen, as before the move.
    module = Classifier()
    variables = module.init(jax.random.key(SEED), x[:1], train=False)
    state = State.create(
        apply_fn=module.apply, tx=tx, dropout_key=jax.random.key(SEED + 1), **variables
    )
    losses: dict[str, list[float]] = {"Linen": []}
    for epoch in track(range(before), "training in Linen", console=console):
        for batch in batches(x, y, epoch):
            state, value = linen_step(state, *batch)
            losses["Linen"].append(float(value))
    ocp.PyTreeCheckpointer().save(out / "linen", state, force=True)

    # The move: what it takes, and then the checkpoint.
    console.print(nnx_bridge.audit.inspect(module, x[:1], train=True))
    flaxlift("convert", out / "linen", out / "nnx", "--force")
    native = NativeClassifier(nnx.Rngs(99))
    host = nnx_bridge.Host.init(module, jax.random.key(99), x[:1], train=False)
    runs: dict[str, tuple[Any, nnx.Optimizer, jax.Array]] = {}
    for name, model in {"NNX": native, "NNX, hosted": host}.items():
        optimizer_of = nnx.Optimizer(model, tx, wrt=nnx.Param)
        beside = nnx_bridge.load_checkpoint(out / "nnx", model, optimizer_of)
        runs[name] = (model, optimizer_of, beside["dropout_key"])
    trained = {"params": state.params, "batch_stats": state.batch_stats}
    case = nnx_bridge.Case(module, (x[:32],), {"train": True}, variables=trained)
    report = nnx_bridge.check(case)
    console.print(report)

    # Training goes on, in all three.
    stop = len(losses["Linen"])
    losses |= {name: [] for name in runs}
    for epoch in track(range(before, before + after), "in Linen and NNX", console=console):
        for batch in batches(x, y, epoch):
            state, value = linen_step(state, *batch)
            losses["Linen"].append(float(value))
            for name, run in runs.items():
                losses[name].append(float(nnx_step(*run, *batch)))

    def accuracy(predict: Callable[[np.ndarray], jax.Array]) -> float:
        return float((predict(x_test).argmax(-1) == y_test).mean())

    trained = {"params": state.params, "batch_stats": state.batch_stats}
    scores = {"Linen": accuracy(lambda x: module.apply(trained, x, train=False))}
    for name, (model, *_) in runs.items():
        scores[name] = accuracy(lambda x, model=model: model(x, train=False))
    rows = []
    for name, score in scores.items():
        mine = losses[name][-after * (len(x) // BATCH) :]
        difference = np.abs(np.array(mine) - np.array(losses["Linen"][stop:])).max()
        rows.append((name, f"{mine[-1]:.6f}", f"{difference:.3g}", f"{score:.4f}"))
        console.print(f"{name:<12} test accuracy {score:.4f}, largest difference {difference:.3g}")
    page = out / "report.html"
    page.write_text(
        _PAGE.render(curves=curves(losses, stop), rows=rows, agrees=report.agrees), encoding="utf-8"
    )
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return page


def curves(losses: dict[str, list[float]], stop: int) -> str:
    """The loss curves as an image in text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    widths, styles = iter((5, 2.5, 1)), iter(("-", "-", "--"))
    for name, values in losses.items():
        first = 0 if name == "Linen" else stop
        steps = np.arange(first, first + len(values))
        axes.plot(steps, values, label=name, linewidth=next(widths), linestyle=next(styles))
    axes.axvline(stop, color="black", linewidth=0.8)
    axes.text(stop, axes.get_ylim()[1], " converted", va="top")
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    plt.close(figure)
    return base64.b64encode(stream.getvalue()).decode()


_PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>From Linen to NNX: digits</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; }
  table { border-collapse: collapse; }
  td, th { padding: 0.3rem 1rem; border-bottom: 1px solid #ccc; text-align: right; }
  td:first-child, th:first-child { text-align: left; }
  img { max-width: 100%; }
</style>
<h1>From Linen to NNX: digits</h1>
<p>A Linen classifier was trained, saved and converted. From the line on, training went on in Linen
and in NNX with the same batches.</p>
<img src="data:image/png;base64,{{ curves }}" alt="Loss curves">
<table>
  <tr><th>run</th><th>last loss</th><th>largest difference from Linen</th>
      <th>test accuracy</th></tr>
  {% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
  {% endfor %}
</table>
<p>The checks of the trained model under <code>lifted</code> and hosted
{{ "all agree" if agrees else "do not all agree" }} with raw JAX.</p>
</html>
""",
    autoescape=True,
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/digits_migration"))
    main(parser.parse_args().out)

"""Digits with a plain network, with Dropout and with DropConnect: accuracy, calibration, doubt.

One small network is trained three ways on part of scikit-learn's digits, for several seeds, and
asked about the digits it has not seen and about images that are no digits at all (the pixels of
digits, shuffled).  The two stochastic networks predict twice: plainly, and as the mean over masks.

    python examples/dropconnect_digits.py --save benchmarks/results
"""

import argparse
import pathlib
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

import layers

RATE, WIDTH, STEPS, BATCH, SAMPLES = 0.5, 128, 600, 64, 64
METHODS = ("plain", "Dropout", "Dropout, MC", "DropConnect", "DropConnect, MC")


def network(kind: str, seed: int) -> nnx.Module:
    rngs = nnx.Rngs(seed)
    model = nnx.Sequential(
        nnx.Linear(64, WIDTH, rngs=rngs),
        nnx.relu,
        nnx.Linear(WIDTH, WIDTH, rngs=rngs),
        nnx.relu,
        nnx.Linear(WIDTH, 10, rngs=rngs),
    )
    if kind == "Dropout":
        a, b, c, d, e = model.layers
        dropouts = [nnx.Dropout(RATE, rngs=rngs) for _ in range(2)]
        return nnx.Sequential(a, b, dropouts[0], c, d, dropouts[1], e)
    if kind == "DropConnect":
        model, summary = layers.dropconnect(model, RATE, rngs=rngs)
        if seed == 0:
            print(summary, end="\n\n")
    return model


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
    def loss(model: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def train(kind: str, seed: int, x: np.ndarray, y: np.ndarray) -> nnx.Module:
    model = network(kind, seed)
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
    draw = np.random.default_rng(seed)
    for _ in range(STEPS):
        rows = draw.integers(len(x), size=BATCH)
        train_step(model, optimizer, x[rows], y[rows])
    model.eval()
    return model


def probabilities(model: Any, x: jax.Array) -> jax.Array:
    return jax.nn.softmax(model(x))


def predict(model: Any, x: np.ndarray, monte_carlo: bool) -> np.ndarray:
    if not monte_carlo:
        return np.asarray(probabilities(model, x))
    result = layers.mc_predict(
        model,
        x,
        fn=probabilities,
        num_samples=SAMPLES,
        key=jax.random.key(0),
        stochastic=(layers.DropConnectModule, nnx.Dropout),
    )
    return np.asarray(result.mean)


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(p + 1e-12)).sum(-1)


def reliability(p: np.ndarray, y: np.ndarray, bins: int = 10) -> tuple[np.ndarray, ...]:
    """Mean confidence, accuracy and count of each bin of confidence."""
    confidence, correct = p.max(-1), p.argmax(-1) == y
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    safe = np.maximum(count, 1)
    sums = (np.bincount(index, weights=w, minlength=bins) for w in (confidence, correct))
    return *(s / safe for s in sums), count


def scores(p: np.ndarray, y: np.ndarray, noise: np.ndarray) -> dict[str, float]:
    confidence, accuracy, count = reliability(p, y)
    labels = np.r_[np.zeros(len(p)), np.ones(len(noise))]
    return {
        "accuracy": (p.argmax(-1) == y).mean(),
        "log loss": -np.log(p[np.arange(len(y)), y] + 1e-12).mean(),
        "calibration error": (np.abs(confidence - accuracy) * count).sum() / count.sum(),
        "no digit (AUROC)": roc_auc_score(labels, np.r_[entropy(p), entropy(noise)]),
    }


def experiment(seeds: int, train_size: int) -> tuple[dict[str, list[dict[str, float]]], Any]:
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype("float32")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    pooled: dict[str, list[Any]] = {name: [] for name in METHODS}
    for seed in range(seeds):
        x, x_test, y, y_test = train_test_split(
            images, labels, train_size=train_size, random_state=seed, stratify=labels
        )
        noise = np.random.default_rng(seed).permuted(x_test, axis=1)
        for kind in ("plain", "Dropout", "DropConnect"):
            model = train(kind, seed, x, y)
            for monte_carlo in (False, True)[: 1 + (kind != "plain")]:
                name = kind + ", MC" * monte_carlo
                p, q = predict(model, x_test, monte_carlo), predict(model, noise, monte_carlo)
                results[name].append(scores(p, y_test, q))
                pooled[name].append((p, y_test, q))
    return results, {
        name: [np.concatenate(part) for part in zip(*runs, strict=True)]
        for name, runs in pooled.items()
    }


def report(results: dict[str, list[dict[str, float]]], train_size: int) -> str:
    measures = list(results["plain"][0])
    seeds = len(results["plain"])
    lines = [
        "# Digits: plain, Dropout and DropConnect",
        "",
        f"Mean ± standard deviation over {seeds} seeds; {train_size} training digits, rate {RATE}, "
        f"{SAMPLES} masks.",
        "",
        "| method | " + " | ".join(measures) + " |",
        "|---|" + "---:|" * len(measures),
    ]
    for name, runs in results.items():
        columns = [[run[m] for run in runs] for m in measures]
        cells = [f"{np.mean(c):.3f} ± {np.std(c):.3f}" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "![Calibration, rejection and doubt](dropconnect_digits.png)"]
    return "\n".join(lines) + "\n"


def plot(pooled: Any, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (calibration, rejection, doubt) = plt.subplots(1, 3, figsize=(13, 3.8))
    calibration.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    for name, (p, y, noise) in pooled.items():
        confidence, accuracy, count = reliability(p, y)
        enough = count >= 20
        calibration.plot(confidence[enough], accuracy[enough], marker="o", label=name)
        order = np.argsort(entropy(p))
        right = np.cumsum((p.argmax(-1) == y)[order]) / np.arange(1, len(y) + 1)
        kept = np.arange(1, len(y) + 1) / len(y)
        rejection.plot(kept[len(y) // 2 :], right[len(y) // 2 :], label=name)
        doubt.hist(entropy(noise), bins=30, histtype="step", density=True, label=name)
    calibration.set(xlabel="confidence", ylabel="accuracy", title="Calibration")
    rejection.set(xlabel="share answered, surest first", ylabel="accuracy", title="Rejection")
    doubt.set(xlabel="predictive entropy", ylabel="density", title="Images that are no digits")
    calibration.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train-size", type=int, default=300)
    parser.add_argument("--save", type=pathlib.Path, help="folder for dropconnect_digits.md, .png")
    options = parser.parse_args()
    results, pooled = experiment(options.seeds, options.train_size)
    text = report(results, options.train_size)
    print(text)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "dropconnect_digits.md").write_text(text)
        plot(pooled, options.save / "dropconnect_digits.png")


if __name__ == "__main__":
    main()

"""DropConnect in a whole model, and out of it again.

Both directions rebuild the model from a clone, so the caller's model is never written to.  Layers
that occur twice are replaced once, by the same object.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from layers._flax_private import node_attributes
from layers._generators import Generator
from layers._keys import RngSource, check_key
from layers._linear import DropConnectLinear
from layers._rates import check_rate
from layers._select import Path, Selector, is_weight, join, no_match, to_predicate
from layers._weight_drop import WeightDrop

M = TypeVar("M")
_STREAMS = (nnx.Rngs, nnx.RngStream)


@dataclasses.dataclass(frozen=True)
class Replacement:
    """One selected layer.

    Attributes:
      path: where it is in the model.
      before: the class that it was.
      after: the class that it is now; the same where it was kept.
      weights: how many weights it has, biases and scales not counted.
    """

    path: Path
    before: str
    after: str
    weights: int


@dataclasses.dataclass(frozen=True)
class DropConnectSummary:
    """What `dropconnect` did; prints as a table.

    Attributes:
      rate: probability of dropping a weight.
      rows: the selected layers, in the order of the model.
    """

    rate: float
    rows: tuple[Replacement, ...]

    @property
    def replaced(self) -> tuple[Path, ...]:
        """Paths of the layers that were replaced."""
        return tuple(row.path for row in self.rows if row.before != row.after)

    @property
    def kept(self) -> tuple[Path, ...]:
        """Paths of the layers that were selected and left as they were."""
        return tuple(row.path for row in self.rows if row.before == row.after)

    def __str__(self) -> str:
        table = [("path", "layer", "now", "weights")]
        for row in self.rows:
            after = "kept" if row.before == row.after else row.after
            table.append((join(row.path) or "(model)", row.before, after, f"{row.weights:,}"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, f"{len(self.replaced)} replaced at rate {self.rate}"])


def dropconnect(
    model: M,
    rate: float = 0.25,
    *,
    only: Selector = nnx.Linear,
    keep_first: bool = True,
    params: Selector = is_weight,
    share: bool = True,
    rngs: RngSource | None = None,
    rng_collection: str = "dropconnect",
    generator: Generator = "default",
    per_example: bool = False,
) -> tuple[M, DropConnectSummary]:
    """A copy of `model` with DropConnect in the chosen layers.

    When to use: to regularise a model that exists, or to measure its uncertainty.  An `nnx.Linear`
    becomes a `DropConnectLinear`, any other module a `WeightDrop` around itself.

    Args:
      model: an NNX module, or an `nnx.List` or `nnx.Dict` of modules.
      rate: probability of dropping a weight, in [0, 1).
      only: which modules to replace: a type, a path glob, a predicate of (path, module), or
        several.  Inside a module that is replaced, nothing else is.
      keep_first: leave the first selected layer as it is, as the published transformation does:
        the inputs of a model are not redundant as its features are.  First is meant in the order
        in which attributes were assigned; a model that came out of `nnx.merge` or `nnx.clone` has
        lost it and is searched in the order of its attributes' names.
      params: which weights of a selected module other than `nnx.Linear` to drop.
      share: if True the new model holds the very Variables of `model`, so that training one
        trains both; if False it holds copies.
      rngs: source of the stream that each new layer holds; without it, pass `rngs` in each call.
      rng_collection: the stream to ask for a key.
      generator: where the bits of the masks come from; see `drop_weight`.
      per_example: one mask for each example in every `DropConnectLinear`.

    Returns:
      The new model and a summary that prints as a table.

    Raises:
      ValueError: if `only` selects nothing to replace, or `rate` is outside [0, 1).
      TypeError: if an argument has the wrong type.

    Source: Wan et al., ICML 2013; Mobiny et al., 2021.

    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> mlp = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 2, rngs=rngs))
    >>> dropped, summary = dropconnect(mlp, 0.5, rngs=rngs)
    >>> print(summary)
    path      layer   now                weights
    --------  ------  -----------------  -------
    layers/0  Linear  kept               32
    layers/2  Linear  DropConnectLinear  16
    1 replaced at rate 0.5
    >>> type(remove_dropconnect(dropped).layers[2]).__name__
    'Linear'
    """
    rate = check_rate(rate)
    predicate = to_predicate(only, "only")
    if isinstance(rngs, jax.Array | np.ndarray):
        # As a stream, so that each layer forks another key from it.
        rngs = nnx.RngStream(check_key(rngs, "rngs"), tag=rng_collection)
    options: dict[str, Any] = {
        "rngs": rngs,
        "rng_collection": rng_collection,
        "generator": generator,
    }
    rows: list[Replacement] = []

    def replace(path: Path, module: Any) -> Any:
        if isinstance(module, DropConnectLinear | WeightDrop):
            return module
        if not isinstance(module, nnx.Module) or not predicate(path, module):
            return None
        kept = keep_first and not rows
        new = module
        if not kept and type(module) is nnx.Linear:
            new = DropConnectLinear(module, rate, per_example=per_example, **options)
        elif not kept:
            new = WeightDrop(module, rate, params=params, **options)
        rows.append(Replacement(path, type(module).__name__, type(new).__name__, _size(module)))
        return new

    modules: list[Path] = []
    new_model = _rebuild(nnx.clone(model, variables=not share), model, replace, modules)
    summary = DropConnectSummary(rate, tuple(rows))
    if not summary.replaced:
        if summary.kept:
            raise ValueError(
                f"only={only!r} selects one layer, {join(summary.kept[0]) or '(model)'}, and "
                "keep_first=True keeps it; pass keep_first=False to replace it too."
            )
        raise no_match("only", only, modules)
    return new_model, summary


def remove_dropconnect(model: M, *, share: bool = True) -> M:
    """A copy of `model` with the plain layers back in place: the inverse of `dropconnect`.

    When to use: to save or deploy a model without this package, or after regularised training.

    Args:
      model: any model, also one whose DropConnect layers were built by hand.
      share: if True the new model holds the very Variables of `model`; if False, copies.

    Returns:
      A model without `DropConnectLinear` and `WeightDrop`, equal to `model` when deterministic.

    >>> from flax import nnx
    >>> layer = DropConnectLinear.create(2, 3, rngs=nnx.Rngs(0))
    >>> type(remove_dropconnect(layer)).__name__
    'Linear'
    """

    def replace(path: Path, module: Any) -> Any:
        del path
        if isinstance(module, DropConnectLinear):
            return module.to_linear()
        if isinstance(module, WeightDrop):
            return _rebuild(module.base_layer, module.base_layer, replace, [])
        return None

    return _rebuild(nnx.clone(model, variables=not share), model, replace, [])


def _size(module: nnx.Module) -> int:
    leaves = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return sum(leaf.size for path, leaf in leaves if is_weight(path, leaf))


def _rebuild(root: Any, like: Any, replace: Callable[[Path, Any], Any], seen: list[Path]) -> Any:
    """Replaces each module of `root` for which `replace` returns another one, in place.

    A module for which it returns None is searched.  `like` is the model that `root` is a clone of:
    cloning sorts attributes, and only the original knows the order in which they were assigned.
    `seen` collects the paths of the modules that were offered.
    """
    done: dict[int, Any] = {}

    def visit(path: Path, node: Any, like: Any) -> Any:
        if isinstance(node, tuple):
            names = getattr(node, "_fields", range(len(node)))
            triples = zip(names, node, like, strict=True)
            new = [visit((*path, name), *pair) for name, *pair in triples]
            if all(a is b for a, b in zip(new, node, strict=True)):
                return node
            return node._make(new) if hasattr(node, "_make") else tuple(new)
        if not isinstance(node, nnx.Pytree | list | dict) or isinstance(node, _STREAMS):
            return node
        if id(node) in done:
            return done[id(node)]
        replaced = None
        if isinstance(node, nnx.Module):
            seen.append(path)
            replaced = replace(path, node)
        done[id(node)] = node if replaced is None else replaced
        if replaced is None:
            children = _children(node)
            for name, original in _children(like).items():
                changed = visit((*path, name), children[name], original)
                if changed is not children[name]:
                    _assign(node, name, changed)
        return done[id(node)]

    return visit((), root, like)


def _children(node: Any) -> dict[Any, Any]:
    if isinstance(node, dict):
        return node
    if isinstance(node, list | nnx.List):
        return dict(enumerate(node))
    return node_attributes(node)


def _assign(node: Any, name: Any, value: Any) -> None:
    if isinstance(node, nnx.Pytree) and not isinstance(node, nnx.List):
        setattr(node, name, nnx.data(value))
    else:
        node[name] = value

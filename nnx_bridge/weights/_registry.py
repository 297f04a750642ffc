"""What is known of pairs of layer classes: their names, and where their arrays lie differently.

Only the target is looked at, never a version: which arrays an `nnx.GRUCell` has, the model says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from nnx_bridge._collections import Path
from nnx_bridge.weights._layouts import Absent, Concatenate, Copy, Layout


@dataclasses.dataclass(frozen=True)
class Part:
    """Some arrays of a Linen layer, and those of its NNX twin that hold the same.

    Attributes:
      linen: Their paths within the layer, such as `(("ir", "kernel"), ("iz", "kernel"))`.
      nnx: Those in the twin; empty where it has no place for them.
      layout: How one becomes the other.
      collection: The Linen collection they belong to; by default that of the twin's Variables.
    """

    linen: tuple[Path, ...]
    nnx: tuple[Path, ...]
    layout: Layout = Copy()
    collection: str | None = None


Shapes = Mapping[Path, jax.ShapeDtypeStruct]
Parts = Callable[[Shapes], Iterable[Part]]

_NAMES: dict[type, dict[str, None]] = {}
_PARTS: dict[type, dict[type, Parts]] = {}


def register_layout(
    linen_cls: type[nn.Module], nnx_cls: type[nnx.Module], parts: Parts | None = None
) -> None:
    """Teaches `match` a pair of layer classes. It holds for subclasses of the NNX class too.

    Args:
      linen_cls: A Linen module class. The names that Linen gives to its instances (`Dense_0`) then
        speak for `nnx_cls`.
      nnx_cls: Its NNX twin.
      parts: Where the arrays lie differently: a function from the paths of the twin's own arrays,
        with their shapes and dtypes, to `Part` objects. Arrays that are in no part have the same
        path on both sides. It is asked for each instance, so that it need not know their options.

    Example:
        >>> class Halves(nn.Module):
        ...     pass
        >>> class Whole(nnx.Module):
        ...     pass
        >>> def parts(shapes):
        ...     width = shapes[("kernel",)].shape[-1] // 2
        ...     halves = (("left",), ("right",))
        ...     yield Part(halves, (("kernel",),), Concatenate((width, width)))
        >>> register_layout(Halves, Whole, parts)
    """
    _NAMES.setdefault(nnx_cls, {})[linen_cls.__name__.lower()] = None
    if parts is not None:
        _PARTS.setdefault(nnx_cls, {})[linen_cls] = parts


def names_of_class(nnx_cls: type) -> tuple[str, ...]:
    """Names in lower case that Linen may have given to what an NNX class is the twin of."""
    names = {nnx_cls.__name__.lower(): None}
    for cls in nnx_cls.__mro__:
        names.update(_NAMES.get(cls, {}))
    return tuple(names)


def known_parts(nnx_cls: type) -> list[Parts]:
    """The functions that say how instances of an NNX class may be made of Linen's arrays."""
    return [parts for cls in nnx_cls.__mro__ for parts in reversed(_PARTS.get(cls, {}).values())]


def _gates(side: str, gates: str, shapes: Shapes) -> Iterable[Part]:
    """`dense_i/kernel` from `ii/kernel`, `if/kernel`, ...; and the same for biases."""
    for name in ("kernel", "bias"):
        path = (f"dense_{side}", name)
        if path in shapes:
            width = shapes[path].shape[-1] // len(gates)
            linen = tuple((f"{side}{gate}", name) for gate in gates)
            yield Part(linen, (path,), Concatenate((width,) * len(gates)))


def _lstm(shapes: Shapes) -> Iterable[Part]:
    yield from _gates("i", "ifgo", shapes)
    yield from _gates("h", "ifgo", shapes)


def _gru(shapes: Shapes) -> Iterable[Part]:
    if ("dense_h", "kernel") not in shapes:
        return  # A subclass of another make.
    yield from _gates("i", "rzn", shapes)
    yield from _gates("h", "rzn", shapes)
    if ("hn_bias",) in shapes:
        yield Part((("hn", "bias"),), (("hn_bias",),))
    elif ("dense_h", "bias") not in shapes:
        kernel = shapes["dense_h", "kernel"]
        absent = Absent(
            (*kernel.shape[:-2], kernel.shape[-1] // 3),
            str(kernel.dtype),
            "this nnx.GRUCell has no bias inside of its reset gate; use the GRUCell of "
            "nnx_bridge.compat, which has Linen's parameters",
        )
        yield Part((("hn", "bias"),), (), absent, "params")


def _simple(shapes: Shapes) -> Iterable[Part]:
    for path in shapes:
        if path[0] in ("dense_i", "dense_h"):
            yield Part(((path[0][-1], *path[1:]),), (path,))


def _normalised(key: str, collection: str, names: tuple[str, ...]) -> Parts:
    """Keys with slashes in Linen, tuples in a dict in NNX."""

    def parts(shapes: Shapes) -> Iterable[Part]:
        for path in shapes:
            if path[0] == key and isinstance(path[-1], tuple):
                linen: Any = "/".join(("layer_instance", *map(str, path[-1]), *names))
                yield Part(((linen,),), (path,), collection=collection)

    return parts


# Pairs of flax whose arrays have equal paths, apart from those below.
_pairs: list[tuple[type[nn.Module], type[nnx.Module]]] = [
    (nn.Dense, nnx.Linear),
    (nn.DenseGeneral, nnx.LinearGeneral),
    (nn.Einsum, nnx.Einsum),
    (nn.Conv, nnx.Conv),
    (nn.ConvTranspose, nnx.ConvTranspose),
    (nn.Embed, nnx.Embed),
    (nn.BatchNorm, nnx.BatchNorm),
    (nn.LayerNorm, nnx.LayerNorm),
    (nn.RMSNorm, nnx.RMSNorm),
    (nn.GroupNorm, nnx.GroupNorm),
    (nn.InstanceNorm, nnx.InstanceNorm),
    (nn.MultiHeadAttention, nnx.MultiHeadAttention),
    (nn.MultiHeadDotProductAttention, nnx.MultiHeadAttention),
    (nn.SelfAttention, nnx.MultiHeadAttention),
    (nn.LSTMCell, nnx.LSTMCell),
    (nn.RNN, nnx.RNN),
    (nn.Bidirectional, nnx.Bidirectional),
    (nn.Sequential, nnx.Sequential),
    (nn.PReLU, nnx.PReLU),
]
for _linen_cls, _nnx_cls in _pairs:
    register_layout(_linen_cls, _nnx_cls)

register_layout(nn.OptimizedLSTMCell, nnx.OptimizedLSTMCell, _lstm)
register_layout(nn.LSTMCell, nnx.OptimizedLSTMCell, _lstm)
register_layout(nn.GRUCell, nnx.GRUCell, _gru)
register_layout(nn.SimpleCell, nnx.SimpleCell, _simple)
register_layout(nn.WeightNorm, nnx.WeightNorm, _normalised("scales", "params", ("scale",)))
register_layout(nn.SpectralNorm, nnx.SpectralNorm, _normalised("batch_stats", "batch_stats", ()))

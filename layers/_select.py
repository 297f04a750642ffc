"""Choosing weights and layers: a selector is a type, a path glob, a predicate, or several of them.

Paths are tuples, as in `nnx.iter_graph`; a glob is matched against their parts joined by `/`.
"""

import fnmatch
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
from flax import nnx

Path: TypeAlias = tuple[Any, ...]
Predicate: TypeAlias = Callable[[Path, Any], bool]
Selector: TypeAlias = type | str | Predicate | tuple[Any, ...] | list[Any]

_NOT_WEIGHTS = ("bias", "scale")
_RECURRENT = ("dense_h", "h", "hi", "hf", "hg", "ho", "hr", "hz", "hn")


def join(path: Path) -> str:
    """The path as it is written in globs and messages."""
    return "/".join(map(str, path))


def to_predicate(selector: Selector, name: str) -> Predicate:
    """A function of (path, value) that says whether the value is selected.

    Raises:
      TypeError: if `selector` is none of the accepted kinds.
    """
    if isinstance(selector, type):
        return lambda path, value: isinstance(value, selector)
    if isinstance(selector, str):
        return lambda path, value: fnmatch.fnmatchcase(join(path), selector)
    if isinstance(selector, tuple | list):
        parts = [to_predicate(part, name) for part in selector]
        return lambda path, value: any(part(path, value) for part in parts)
    if callable(selector):
        return selector
    raise TypeError(
        f"{name} must be a type, a path glob such as '*/kernel', a predicate of (path, value), or "
        f"a tuple of these, got {selector!r} of type {type(selector).__name__}."
    )


def is_weight(path: Path, value: Any) -> bool:
    """Selects the weights: every Param (or array) of two or more axes but biases and scales.

    When to use: it is the default of `params` in this package; in a predicate of your own it leaves
    out what is no weight.

    Args:
      path: where the value stands in its module.
      value: a Variable, an array, or what has the shape of one.

    Returns:
      Whether it is selected.

    >>> import jax.numpy as jnp
    >>> is_weight(("query", "kernel"), jnp.ones((2, 3))), is_weight(("bias",), jnp.ones((2, 3)))
    (True, False)
    """
    if isinstance(value, nnx.Variable) and not isinstance(value, nnx.Param):
        return False
    return getattr(value, "ndim", 0) >= 2 and path[-1] not in _NOT_WEIGHTS


def hidden_to_hidden(path: Path, value: Any) -> bool:
    """Selects the recurrent kernels of the LSTM, GRU and simple cells of Flax, NNX and Linen.

    When to use: as `params` of `WeightDrop(nnx.RNN(cell), ...)`, which is the weight-dropped LSTM.

    Args:
      path: where the value stands in its module.
      value: a Variable, an array, or what has the shape of one.

    Returns:
      Whether it is selected.

    Source: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models", ICLR 2018.

    >>> import jax.numpy as jnp
    >>> hidden_to_hidden(("cell", "hf", "kernel"), jnp.ones((2, 2)))
    True
    >>> hidden_to_hidden(("cell", "if_", "kernel"), jnp.ones((2, 2)))
    False
    """
    return is_weight(path, value) and len(path) >= 2 and path[-2] in _RECURRENT


def weight_keys(key: jax.Array, paths: Iterable[Path]) -> dict[Path, jax.Array]:
    """One key for each path; a lone weight has `key` itself.

    The key depends on the path and not on its rank, so that an attribute that is added later does
    not change the masks of the rest.  Linen's and NNX's spelling of a path have the same key.
    """
    paths = list(paths)
    if len(paths) == 1:
        return {paths[0]: key}
    return {path: jax.random.fold_in(key, zlib.crc32(_spelled(path))) for path in paths}


def _spelled(path: Path) -> bytes:
    # The gate `if` is `if_` in NNX, and Linen's `layers_0` is `layers/0`.
    plain = "/".join(str(part).rstrip("_") for part in path)
    return re.sub(r"_(?=\d+(/|$))", "/", plain).encode()


def no_match(name: str, selector: Any, known: Iterable[Path]) -> ValueError:
    """The error for a selector that selects nothing."""
    listing = ", ".join(sorted(join(path) or "(model)" for path in known)) or "nothing"
    return ValueError(f"{name}={selector!r} selects nothing; there is: {listing}.")

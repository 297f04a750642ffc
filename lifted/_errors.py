"""Words that the error messages share: paths, types, and the name that was probably meant."""

import difflib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Path = tuple[Any, ...]
_KEY_ATTRIBUTES = {
    jax.tree_util.DictKey: "key",
    jax.tree_util.GetAttrKey: "name",
    jax.tree_util.SequenceKey: "idx",
    jax.tree_util.FlattenedIndexKey: "key",
}


def path_text(path: Path) -> str:
    """``('params', 'Dense_0', 'kernel')`` as ``params/Dense_0/kernel``."""
    return "/".join(str(part) for part in path)


def key_of(entry: Any) -> Any:
    """The dictionary key, attribute name or index that a `jax.tree_util` key entry stands for."""
    attribute = _KEY_ATTRIBUTES.get(type(entry))
    return entry if attribute is None else getattr(entry, attribute)


def describe(x: Any) -> str:
    """Dtype and shape of an array, otherwise the type: ``float32[3,4]``, ``dict``."""
    if is_array(x):
        return f"{dtype_of(x)}[{','.join(map(str, np.shape(x)))}]"
    return type(x).__name__


def is_array(x: Any) -> bool:
    """Whether JAX takes ``x`` for an array or a scalar."""
    if isinstance(x, (bool, int, float, complex)):
        return True
    # Layers have a dtype too. Objects, strings, dates and times are arrays of NumPy only.
    has_both = hasattr(x, "dtype") and hasattr(x, "shape")
    return has_both and getattr(x.dtype, "kind", None) not in tuple("OSUMm")


def dtype_of(x: Any) -> Any:
    """Dtype that JAX gives to an array or Python scalar."""
    if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return x.dtype
    return np.dtype(jax.dtypes.float0) if is_float0(x) else jax.dtypes.result_type(x)


def is_float0(x: Any) -> bool:
    """Whether ``x`` is the trivial tangent of an integer, a boolean or a key."""
    return getattr(x, "dtype", None) == jax.dtypes.float0


def suggestion(name: Any, known: Iterable[Any]) -> str:
    """Known names for an error message, the one that ``name`` was probably meant to be first."""
    names = [str(k) for k in known]
    if not names:
        return "there are none"
    nearest = difflib.get_close_matches(str(name), names, n=1)
    listing = "known: " + ", ".join(sorted(names))
    return f"did you mean {nearest[0]!r}? ({listing})" if nearest else listing

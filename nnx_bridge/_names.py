"""Names of Linen as attributes of NNX modules, and back: the one place that knows the rule.

An attribute has Linen's name, with one more underscore at the end where NNX modules or hosts have
an attribute of that name themselves: Linen's `train` is the attribute `train_`, its `train_` is
`train__`. States of NNX, and checkpoints of them, have the names of attributes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from flax import nnx

from lifted._errors import Path
from nnx_bridge import _flax_private

# In these hosts keep what is no variable of Linen.
OWN_ATTRIBUTES = ("_linen", "_linen_rngs", "_linen_mode")
_OF_NODES = (
    *("deterministic", "set_view", "training_arguments", "use_running_average"),
    *("_base", "_evaluates", "_kind", "_new_level"),
)
# Names with two underscores in front are Python's; see `_is_reserved`.
RESERVED = frozenset(
    name for name in (*OWN_ATTRIBUTES, *_OF_NODES, *dir(nnx.Module)) if not name.startswith("__")
)


def attribute_name(name: str) -> str:
    """The attribute of a submodule or variable with this name in Linen.

    Example:
        >>> attribute_name("train"), attribute_name("train_"), attribute_name("encoder")
        ('train_', 'train__', 'encoder')
    """
    return f"{name}_" if _is_reserved(name) else name


def linen_name(attribute: Any) -> Any:
    """The name in Linen of what stands in this attribute, the inverse of `attribute_name`.

    Example:
        >>> linen_name("train__"), linen_name("if_"), linen_name(0)
        ('train_', 'if_', 0)
    """
    if isinstance(attribute, str) and attribute[-1:] == "_" and _is_reserved(attribute):
        return attribute[:-1]
    return attribute


def linen_names(path: Iterable[Any]) -> Path:
    """A path of attributes in Linen's names."""
    return tuple(map(linen_name, path))


def free_attribute(collection: str, name: str, taken: Collection[str]) -> str:
    """The attribute of a variable in a module where the attributes `taken` exist already.

    Of equal names in two collections, one keeps the name.

    Example:
        >>> free_attribute("ema", "w", {"w"})
        'ema_w'
    """
    attribute = attribute_name(name)
    if attribute in taken:
        attribute = attribute_name(f"{collection}_{name}")
    while attribute in taken:
        attribute += "_"
    return attribute


def located(path: Path, places: Collection[Path]) -> Path:
    """A path of attributes as `places` have it.

    NNX modules of other people may have an attribute that hosts would rename, such as a key of
    `nnx.Dict`.
    """
    if path in places:
        return path
    plain = linen_names(path)
    return plain if plain in places else path


def _is_reserved(name: str) -> bool:
    of_python = name.startswith("__")
    return name.rstrip("_") in RESERVED or of_python or _flax_private.is_bookkeeping(name)

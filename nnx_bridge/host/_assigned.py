"""What may stand in an attribute of a node."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from flax import nnx

from lifted._errors import describe, path_text, suggestion
from nnx_bridge._names import OWN_ATTRIBUTES, attribute_name, linen_name
from nnx_bridge.host._program import Place
from nnx_bridge.host._tree import Level, slots


def check_replacement(node: Level, name: str, value: nnx.Module) -> None:
    """Checks that a module may stand in the place of the submodule ``name``.

    Raises:
      AttributeError: There is no such submodule.
      TypeError: The module cannot be called.
    """
    place: Place = slots(node)["_linen"]
    if name != attribute_name(linen_name(name)):
        raise AttributeError(
            f"{name!r} is an attribute of every NNX module; the submodule of this name is "
            f"replaced by model[{name!r}] = ..."
        )
    submodules = [n for n, x in slots(node).items() if isinstance(x, nnx.Module)]
    submodules += map(attribute_name, place.program.layout.children(place.path))
    if name not in {*submodules} - {*OWN_ATTRIBUTES}:
        where = path_text(place.path) or type(node).__name__
        raise AttributeError(
            f"{where} has no submodule {name!r} that could be replaced; "
            f"{suggestion(name, {*submodules} - {*OWN_ATTRIBUTES})}"
        )
    below = (*place.path, linen_name(name))
    methods = {method for path, method, _ in place.program.layout.returned if path == below}
    for method in methods or {"__call__"}:
        if not callable(getattr(value, method, None)):
            raise TypeError(
                f"{path_text(below)}: the model calls its method {method!r}, which its "
                f"replacement {type(value).__name__} does not have"
            )


def check_value(node: Level, name: str, value: Any) -> None:
    """Checks that what is no NNX module may stand in an attribute: what Linen reads may not go.

    Raises:
      TypeError: There is a submodule, or a Variable where ``value`` is none.
    """
    place: Place = slots(node)["_linen"]
    held = slots(node).get(name)
    linen, got = linen_name(name), describe(value)
    path = path_text((*place.path, linen))
    if isinstance(held, nnx.Module) or linen in place.program.layout.children(place.path):
        hint = "; host it first: Host.init(module, rngs, *inputs)"
        raise TypeError(
            f"{path}: only an NNX module replaces a submodule, got {got}"
            f"{hint if isinstance(value, nn.Module) else ''}"
        )
    if isinstance(held, nnx.Variable) and not isinstance(value, nnx.Variable):
        raise TypeError(
            f"{path} is a Variable, which {got} would remove; write its value, .{name}[...] = ..., "
            f"or assign a {type(held).__name__}"
        )

"""Properties of a Linen class, and its constants, as attributes of a node."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax.errors import FlaxError

from nnx_bridge._values import map_leaves
from nnx_bridge.host._binding import path_of
from nnx_bridge.host._program import Place
from nnx_bridge.host._tree import Level, find, slots


def read_property(top: Level, node: Level, name: str) -> Any:
    """An attribute of the Linen class as its modules have it; modules in it are nodes.

    Args:
      top: the highest node from which ``node`` is known to be reached.
      node: the node.
      name: the attribute.
    """
    place: Place = slots(node)["_linen"]
    module = place.module
    if module is not None:
        # One that needs variables, or what `setup` makes, fails on a module that is not bound.
        with contextlib.suppress(AttributeError, FlaxError):
            return getattr(module, name)
    depth = len(slots(top)["_linen"].path)

    def shown(value: Any) -> Any:
        path = path_of(value) if isinstance(value, nn.Module) else None
        return value if path is None else find(top, path[depth:]) or value

    def read(module: nn.Module) -> Any:
        return map_leaves(shown, getattr(module, name), lambda x: isinstance(x, nn.Module))

    called: Callable[..., Any] = node
    return called(rngs={}, method=read, mutable=False)

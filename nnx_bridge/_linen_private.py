"""The one thing that `nnx_bridge` changes in Flax Linen, for as long as a context lasts.

Linen has no public way to say which keys modules draw: interceptors see the methods of the user's
classes, and `make_rng` is not one of them. ``tests/nnx_bridge/test_linen_private.py`` checks that
all layers of Linen draw through it.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from unittest import mock

import jax
from flax import linen as nn

_DRAW: ContextVar[Callable[[], jax.Array] | None] = ContextVar("draw", default=None)
_PATCHING = threading.RLock()


@contextlib.contextmanager
def keys_from(draw: Callable[[], jax.Array]) -> Iterator[None]:
    """Lets `make_rng` of Linen modules return what ``draw`` returns, in this thread alone."""
    with _PATCHING:
        make_rng = nn.Module.make_rng

        def drawn(self: nn.Module, name: str = "params") -> Any:
            draw = _DRAW.get()
            return make_rng(self, name) if draw is None else draw()

        with mock.patch.object(nn.Module, "make_rng", drawn):
            token = _DRAW.set(draw)
            try:
                yield
            finally:
                _DRAW.reset(token)

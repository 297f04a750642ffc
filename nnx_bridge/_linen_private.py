"""The four things that `nnx_bridge` changes in Flax Linen, for as long as a context lasts.

Linen has no public way to say which keys modules draw, or to see what they sow where it is not
kept: interceptors see the methods of the user's classes, and `make_rng` and `sow` are none of them.
Nor do they see a module that `nn.jit` has a trace of. Nor can a scope be given collections for a
while. ``tests/nnx_bridge/test_linen_private.py`` checks
what each of these contexts relies on.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from unittest import mock

import jax
from flax import linen as nn
from flax.core.scope import Scope
from flax.linen import transforms

_DRAW: ContextVar[Callable[[], jax.Array] | None] = ContextVar("draw", default=None)
_PATCHING = threading.RLock()


@contextlib.contextmanager
def keys_from(draw: Callable[[], jax.Array]) -> Iterator[None]:
    """Lets `make_rng` of Linen modules return what ``draw`` returns, in this thread alone.

    What `nn.jit` draws to have keys of its own for the module is no draw of the module.
    """
    with _PATCHING:
        make_rng, fork_rngs = nn.Module.make_rng, transforms.fork_rngs

        def drawn(self: nn.Module, name: str = "params") -> Any:
            draw = _DRAW.get()
            return make_rng(self, name) if draw is None else draw()

        @contextlib.contextmanager
        def forked(module: nn.Module) -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                token = _DRAW.set(None)
                try:
                    stack.enter_context(fork_rngs(module))
                finally:
                    _DRAW.reset(token)
                yield

        with (
            mock.patch.object(nn.Module, "make_rng", drawn),
            mock.patch.object(transforms, "fork_rngs", forked),
        ):
            token = _DRAW.set(draw)
            try:
                yield
            finally:
                _DRAW.reset(token)


@contextlib.contextmanager
def sows_told_to(listener: Callable[[nn.Module, str, Any], None]) -> Iterator[None]:
    """Tells of each `sow` of a Linen module, in any thread, whether its collection is kept or not.

    Args:
      listener: Is called with the module, the name and the value.
    """
    with _PATCHING:
        sow: Any = nn.Module.sow

        def sown(self: nn.Module, col: str, name: str, value: Any, *args: Any, **kw: Any) -> Any:
            listener(self, name, value)
            return sow(self, col, name, value, *args, **kw)

        with mock.patch.object(nn.Module, "sow", sown):
            yield


@contextlib.contextmanager
def before_jit(listener: Callable[[nn.Module], object]) -> Iterator[None]:
    """Tells of each module that `nn.jit` is called on, before it looks for a trace, in any thread.

    Args:
      listener: Is called with the module.
    """
    with _PATCHING:
        fork_rngs = transforms.fork_rngs

        @contextlib.contextmanager
        def forked(module: nn.Module) -> Iterator[None]:
            listener(module)
            with fork_rngs(module):
                yield

        with mock.patch.object(transforms, "fork_rngs", forked):
            yield


@contextlib.contextmanager
def extra_collections(scope: Scope, collections: dict[str, Any]) -> Iterator[None]:
    """Lets a scope, and those below it, have collections that its model does not."""
    scope._variables.update(collections)
    try:
        yield
    finally:
        for name in collections:
            scope._variables.pop(name, None)

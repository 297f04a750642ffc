"""Sowing the outputs of methods of NNX modules.

A module is given, for the time of a call, a subclass of its class in which the chosen methods sow
what they return; inherited methods are methods like others. Only the object is touched, never its
class, so that other objects of the class, and other threads, see nothing of it.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flax import nnx

Outputs = Callable[[Any, str], bool]


def is_call(module: Any, name: str) -> bool:
    """The outputs that Linen's ``capture_intermediates=True`` selects."""
    return name == "__call__"


def is_method(module: Any, name: str) -> bool:
    """The outputs that the ``method_outputs`` of `nnx.capture` selects."""
    return name == "__call__" or not name.startswith("_")


@contextlib.contextmanager
def sowing_outputs(
    modules: Sequence[nnx.Module], kind: type[nnx.Variable[Any]], outputs: Outputs
) -> Iterator[None]:
    """Lets methods of ``modules`` sow their outputs as ``kind``, under the name of the method."""
    classes = [type(module) for module in modules]
    try:
        for module, cls in zip(modules, classes, strict=True):
            chosen = frozenset(name for name in _methods(cls) if outputs(module, name))
            if chosen:
                object.__setattr__(module, "__class__", _sowing_class(cls, kind, chosen))
        yield
    finally:
        for module, cls in zip(modules, classes, strict=True):
            object.__setattr__(module, "__class__", cls)


def _methods(cls: type) -> list[str]:
    """Names of the methods that the user's classes define."""
    names = {name for base in cls.__mro__ for name in vars(base) if not hasattr(nnx.Module, name)}
    if "__call__" in dir(cls):
        names.add("__call__")
    return sorted(n for n in names if inspect.isfunction(inspect.getattr_static(cls, n)))


@functools.cache
def _sowing_class(cls: type, kind: type[nnx.Variable[Any]], names: frozenset[str]) -> type:
    methods = {name: _sowing(getattr(cls, name), kind, name) for name in names}
    return type(cls)(cls.__name__, (cls,), {**methods, "__qualname__": cls.__qualname__})


def _sowing(method: Callable[..., Any], kind: type[nnx.Variable[Any]], name: str) -> Any:
    @functools.wraps(method)
    def sowing(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        y = method(self, *args, **kwargs)
        self.sow(kind, name, y)
        return y

    return sowing

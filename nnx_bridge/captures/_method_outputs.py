"""Coming between a caller and the methods of NNX modules, such as to sow what they return.

A module is given, for the time of a call, a subclass of its class in which the chosen methods go
through a function; inherited methods are methods like others. Only the object is touched, never its
class, so that other objects of the class, and other threads, see nothing of it.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flax import nnx

Outputs = Callable[[Any, str], bool]

# What `nnx.jit` makes of a method that it decorates.
_COMPILED = type(nnx.jit(lambda: None))

# From the module, the method's name, the method, and the arguments, to what the method returns.
Around = Callable[[Any, str, Callable[..., Any], Any, Any], Any]


def is_call(module: Any, name: str) -> bool:
    """The outputs that Linen's ``capture_intermediates=True`` selects."""
    return name == "__call__"


def is_method(module: Any, name: str) -> bool:
    """The outputs that the ``method_outputs`` of `nnx.capture` selects."""
    return name == "__call__" or not name.startswith("_")


def sowing_outputs(
    modules: Sequence[nnx.Module], kind: type[nnx.Variable[Any]], outputs: Outputs
) -> contextlib.AbstractContextManager[None]:
    """Lets methods of ``modules`` sow their outputs as ``kind``, under the name of the method."""
    return intercepting(modules, outputs, _Sowing(kind))


@contextlib.contextmanager
def intercepting(
    modules: Sequence[nnx.Module], chosen: Outputs, around: Around, also: Sequence[str] = ()
) -> Iterator[None]:
    """Lets the chosen methods of ``modules`` go through ``around``, which is hashable.

    Methods that every NNX module has are left out but for those named by ``also``.
    """
    classes = [type(module) for module in modules]
    try:
        for module, cls in zip(modules, classes, strict=True):
            names = frozenset([*(name for name in _methods(cls) if chosen(module, name)), *also])
            if names:
                object.__setattr__(module, "__class__", _intercepted_class(cls, around, names))
        yield
    finally:
        for module, cls in zip(modules, classes, strict=True):
            object.__setattr__(module, "__class__", cls)


def _methods(cls: type) -> list[str]:
    """Names of the methods that the user's classes define."""
    names = {name for base in cls.__mro__ for name in vars(base) if not hasattr(nnx.Module, name)}
    if "__call__" in dir(cls):
        names.add("__call__")
    return sorted(n for n in names if _is_function(inspect.getattr_static(cls, n)))


def _is_function(attribute: Any) -> bool:
    return inspect.isfunction(attribute) or isinstance(attribute, _COMPILED)


def uncompiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """The method that ``around`` is given, without the `nnx.jit` that decorates it, if one does.

    That has traces of earlier calls, and of other modules of the same structure.
    """
    if isinstance(call, functools.partial) and isinstance(call.func, _COMPILED):
        return functools.partial(inspect.unwrap(call.func), *call.args)
    return call


@functools.cache
def _intercepted_class(cls: type, around: Around, names: frozenset[str]) -> type:
    methods = {name: _intercepted(getattr(cls, name), around, name) for name in names}
    return type(cls)(cls.__name__, (cls,), {**methods, "__qualname__": cls.__qualname__})


def _intercepted(method: Callable[..., Any], around: Around, name: str) -> Any:
    @functools.wraps(method)
    def intercepted(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        return around(self, name, functools.partial(method, self), args, kwargs)

    return intercepted


@dataclasses.dataclass(frozen=True)
class _Sowing:
    kind: type[nnx.Variable[Any]]

    def __call__(
        self, module: Any, name: str, method: Callable[..., Any], args: Any, kw: Any
    ) -> Any:
        y = method(*args, **kw)
        module.sow(self.kind, name, y)
        return y

"""The way back: a hosted model, replacements included, as a Linen module and its variables."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flax import linen as nn
from flax import nnx
from flax.core.scope import Scope

from nnx_bridge import _linen_private
from nnx_bridge._collections import Path
from nnx_bridge.host._binding import path_of
from nnx_bridge.host._guard import Guard
from nnx_bridge.host._host import Host, host_program
from nnx_bridge.host._interventions import mark
from nnx_bridge.host._layout import Layout
from nnx_bridge.host._marks import UNMARKED, joint, places
from nnx_bridge.host._node_type import received, sent
from nnx_bridge.host._replacement import Replacement
from nnx_bridge.host._replacing import replacing
from nnx_bridge.host._tree import contents


def unhost(model: Host) -> tuple[nn.Module, dict[str, Any]]:
    """The Linen module of a host and its variables as they are now: the inverse of `Host`.

    Without replacements the module is the very one that was hosted. With replacements it is an
    instance of a subclass, whose methods call the NNX modules: their Variables stand among
    the variables at the paths of the modules that they replace. Its `init` gives them the values
    that they have now, whatever the key, since an NNX module does not say how it was made. Linen's
    transforms around a replacement (`nn.scan`, `nn.vmap`, `nn.remat`, ...) find them as they are in
    the host, so stacked where Linen stacks them. A replacement is called by the methods of the
    module, and by what `apply` and `init` get as `method`; other Linen modules must not reach past
    them (`self.model.encode(x)`, not `self.model.encoder(x)`).

    Args:
      model: The host. Its Variables are not shared with what is returned.

    Returns:
      A Linen module that is not bound, and its variables.

    Raises:
      TypeError: ``model`` is no host, or a node of one.

    Example:
        >>> import jax
        >>> x = jax.numpy.ones((2, 4))
        >>> module, variables = unhost(Host.init(nn.Dense(3), jax.random.key(0), x))
        >>> module.apply(variables, x).shape
        (2, 3)
    """
    program = host_program(model)
    found = contents(model)
    module = program.module
    if found.replacements:
        replacements = {
            path: Replacement(path, nnx.clone(replacement), program)
            for path, replacement in found.replacements.items()
        }
        fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.init}
        module = Migration(type(module), replacements, program.layout).module_class(**fields)
    return module, found.tree


class Migration:
    """A Linen class and what replaces submodules of its instances.

    Attributes:
      kind: the class.
      module_class: a subclass that calls the replacements.
    """

    def __init__(self, kind: Any, replacements: dict[Path, Replacement], layout: Layout) -> None:
        self.kind = kind = received(kind)
        self._replacements = replacements
        self._layout = layout
        self._active = _Active()
        of_replacements = {path: replacement.mark for path, replacement in replacements.items()}
        self._marks = [joint(of_replacements)]
        unmarked = dict.fromkeys(layout.submodules, UNMARKED)
        self._of_modules = {**unmarked, **of_replacements}
        self._places = places(self._of_modules)
        slots: dict[str, Any] = {"__doc__": kind.__doc__, "__module__": kind.__module__}
        # That of a dataclass would be made anew, but this one may have been wrapped.
        slots["__init__"] = inspect.getattr_static(kind, "__init__")
        slots["_migration"] = self
        slots["__reduce__"] = lambda module: (_empty, (self,), module.__getstate__())
        slots |= {name: self._method(getattr(kind, name)) for name in _methods(kind)}
        slots |= {name: self._entry(name) for name in ("init", "init_with_output", "apply")}
        self.module_class = type(kind.__name__, (kind,), slots)

    def _entry(self, name: str) -> Callable[..., Any]:
        """A method by which Linen is entered, with any function of the module as ``method``."""
        function = getattr(self.kind, name)

        @nn.nowrap
        @functools.wraps(function)
        def enter(module: nn.Module, *args: Any, method: Any = None, **kwargs: Any) -> Any:
            if isinstance(method, str) and not hasattr(type(module), method):
                method = _submodule(method)
            if callable(method):
                method = self._method(getattr(method, "__func__", method))
            return function(module, *args, method=method, **kwargs)

        return enter

    def _method(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the class, which finds the replacements in the place of the submodules."""

        @functools.wraps(function)
        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            scope = module.scope
            if scope is None or self._active.now:  # A method that another one calls.
                return function(module, *args, **kwargs)
            self._active.now = True
            mark(module, self._marks)
            try:
                base = path_of(module) or ()
                guard = Guard(scope.variables(), self._of_modules, self._marks[0], base)
                with (
                    _provided(scope, self._replacements.values()),
                    replacing(self._replacements, self._layout, self._marks[0], base, [guard]),
                    _linen_private.extra_collections(scope, self._places),
                ):
                    return function(module, *args, **kwargs)
            finally:
                self._active.now = False

        return run

    def __deepcopy__(self, memo: dict[int, Any]) -> Migration:
        return self  # Nothing in it is ever written.

    def __reduce__(self) -> Any:
        # What is known of the modules holds functions of Linen that cannot be pickled.
        return Migration, (sent(self.kind), self._replacements, Layout())


def _submodule(name: str) -> Callable[..., Any]:
    """The function that calls a submodule."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(module, name)(*args, **kwargs)

    return call


def _empty(migration: Migration) -> nn.Module:
    """A module to be filled with what was pickled."""
    made: nn.Module = object.__new__(migration.module_class)
    return made


@contextlib.contextmanager
def _provided(scope: Scope, replacements: Iterable[Replacement]) -> Iterator[None]:
    """Where the module of a scope is initialised, gives replacements the values that they have."""
    made = list(replacements) if scope.get_flag("initializing", False) else []
    for replacement in made:
        replacement.provide(scope)
    yield
    # Again, since `nn.map_variables` takes them for what the model has made, and maps them.
    for replacement in made:
        replacement.provide(scope)


class _Active(threading.local):
    """Whether a method runs."""

    now = False


def _methods(kind: type[nn.Module]) -> list[str]:
    """The methods that a module class has beside those of every Linen module."""
    return [
        name
        for name, value in inspect.getmembers_static(kind)
        if inspect.isfunction(value)
        and name != "setup"
        and (name == "__call__" or not name.startswith("_"))
        and getattr(nn.Module, name, None) is not value
    ]

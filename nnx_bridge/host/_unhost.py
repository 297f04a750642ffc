"""The way back: a hosted model, replacements included, as a Linen module and its variables."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax import nnx

from nnx_bridge._collections import Path
from nnx_bridge.host._host import Host, host_program
from nnx_bridge.host._layout import Layout, path_of
from nnx_bridge.host._replacement import Replacement
from nnx_bridge.host._replacing import replacing
from nnx_bridge.host._tree import contents


def unhost(model: Host) -> tuple[nn.Module, dict[str, Any]]:
    """The Linen module of a host and its variables as they are now: the inverse of `Host`.

    Without replacements the module is the very one that was hosted. With replacements it is an
    instance of a subclass, whose methods call the NNX modules: their Variables stand among
    the variables at the paths of the modules that they replace. Its `init` gives them the values
    that they have now, since an NNX module does not say how it was made.

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
        replacements = {p: Replacement(p, nnx.clone(m)) for p, m in found.replacements.items()}
        module = _replaced(module, replacements, program.layout)
    return module, found.read()


def _replaced(
    module: nn.Module, replacements: dict[Path, Replacement], layout: Layout
) -> nn.Module:
    """The module as an instance of a subclass that calls the replacements."""
    kind = type(module)
    active = _Active()

    def method(name: str) -> Callable[..., Any]:
        function = getattr(kind, name)

        @functools.wraps(function)
        def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.scope is None or active.now:  # A method that another one calls.
                return function(self, *args, **kwargs)
            active.now = True
            try:
                with replacing(replacements, layout, path_of(self) or ()):
                    result = function(self, *args, **kwargs)
            finally:
                active.now = False
            if self.scope.get_flag("initializing", False):
                for replacement in replacements.values():
                    replacement.check_created(self.scope)
            return result

        return run

    slots = {"__doc__": kind.__doc__, "__module__": kind.__module__}
    # That of a dataclass would be made anew, but this one may have been wrapped.
    slots["__init__"] = inspect.getattr_static(kind, "__init__")
    made = type(kind.__name__, (kind,), {**slots, **{n: method(n) for n in _methods(kind)}})
    fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.init}
    of_module: nn.Module = made(**fields)
    return of_module


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

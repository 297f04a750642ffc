"""Bound Linen modules without what binds them to one call, and bound again."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from lifted._errors import path_text
from nnx_bridge._collections import Path
from nnx_bridge._values import leaves, map_leaves


@dataclasses.dataclass(frozen=True)
class Reference:
    """Stands in the field of a module for another module of the model."""

    path: Path

    def __repr__(self) -> str:
        return f"<the module {path_text(self.path)}>"


@dataclasses.dataclass(frozen=True)
class Submodule:
    """One Linen module of a model.

    Attributes:
      kind: its class.
      fields: its dataclass fields, as far as they outlive the call that made it.
      module: the module, not bound; None where a field does not outlive the call.
      unknown: the names of those fields.
      lifted: whether a transform of Linen is around it.
    """

    kind: type[nn.Module]
    fields: dict[str, Any]
    module: nn.Module | None
    unknown: tuple[str, ...] = ()
    lifted: bool = False


def path_of(module: Any) -> Path | None:
    """The path of the variables of a bound module; None of a module that is not bound.

    It is not always `module.path`: below a module that shares its scope (`nn.share_scope`), that is
    the path which the module would have had.
    """
    scope, names = module.scope, []
    if scope is None:
        return None
    while scope.parent is not None:
        names.append(scope.name)
        scope = scope.parent
    return (*scope.path, *reversed(names))


def unbound(module: nn.Module) -> Submodule:
    """A bound module as one that can be bound again."""
    own = path_of(module) or ()
    made: dict[int, nn.Module] = {}
    unknown: list[str] = []
    fields = {}
    for name, value in _fields(module):
        try:
            fields[name] = _map_modules(value, lambda x: _released(x, own, made))
        except _TemporaryError:
            unknown.append(name)
    free = None if unknown else type(module)(parent=None, **fields)
    return Submodule(type(module), fields, free, tuple(unknown), _is_lifted(module))


def as_it_runs(module: nn.Module) -> nn.Module:
    """A bound module with the fields that it has in the running call, not bound."""
    own = path_of(module) or ()
    made: dict[int, nn.Module] = {}
    free = lambda x: _released(x, own, made, outlives=False)  # noqa: E731
    fields = {name: _map_modules(value, free) for name, value in _fields(module)}
    return type(module)(parent=None, **fields)


def _is_lifted(module: nn.Module) -> bool:
    """Whether the scope of a bound module is inside of one that a transform has made."""
    scope = module.scope
    while scope is not None and scope.parent is not None:
        scope = scope.parent
    return scope is not None and bool(scope.path)


def bind(module: nn.Module, scope: Any, resolve: Callable[[Path], nn.Module]) -> nn.Module:
    """A module of `unbound`, bound.

    Args:
      module: the module.
      scope: its scope.
      resolve: gives the bound module that a reference stands for.
    """
    made: dict[int, nn.Module] = {}

    def fresh(value: Any) -> Any:
        if isinstance(value, Reference):
            return resolve(value.path)
        if not is_module(value):
            return value
        if id(value) not in made:
            made[id(value)] = value.clone(**{n: _map_modules(v, fresh) for n, v in _fields(value)})
        return made[id(value)]

    fields = {name: _map_modules(value, fresh) for name, value in _fields(module)}
    # Linen adopts modules without a name: one that was given to others would move to them.
    return module.clone(parent=scope, name=scope.name, **fields)


def given_module(module: nn.Module, path: Path) -> nn.Module | None:
    """The module at ``path`` that a bound module was given from outside; None where it was not."""
    own = path_of(module) or ()
    if path[: len(own)] == own:
        return None
    waiting = [module]
    while waiting:
        values = [value for _, value in _fields(waiting.pop())]
        for inner in _modules_in(values):
            if path_of(inner) == path:
                return inner
            waiting.append(inner)
    return None


class _TemporaryError(Exception):
    """A value does not outlive the call in which it was seen."""


def _released(value: Any, own: Path, made: dict[int, nn.Module], outlives: bool = True) -> Any:
    """A value of a field of the module at ``own`` without what binds it to a call.

    Args:
      value: the value.
      own: the path of the module.
      made: the modules that were released already, by their identity.
      outlives: whether it must outlive the call.
    """
    if not is_module(value):
        if outlives and _is_temporary(value):
            raise _TemporaryError
        return value
    path = path_of(value)
    if path is not None and path[: len(own)] != own:
        return Reference(path)
    if id(value) not in made:
        free = lambda x: _released(x, own, made, outlives)  # noqa: E731
        fields = {name: _map_modules(v, free) for name, v in _fields(value)}
        made[id(value)] = type(value)(parent=None, name=value.name, **fields)
    return made[id(value)]


def below(module: nn.Module) -> list[nn.Module]:
    """The modules among the attributes of a bound module that are bound below it."""
    own = path_of(module) or ()
    bound = [(path_of(m), m) for m in _modules_in(list(vars(module).values()))]
    return [m for p, m in bound if p is not None and len(p) > len(own) and p[: len(own)] == own]


def _is_temporary(value: Any) -> bool:
    """Whether a value is of a running call, or a function that holds one that is."""
    waiting, known = [value], set()
    while waiting:
        found = waiting.pop()
        if isinstance(found, jax.core.Tracer) or (is_module(found) and found.scope is not None):
            return True
        if id(found) not in known:
            known.add(id(found))
            waiting += _held_by(found)
    return False


def _held_by(function: Any) -> list[Any]:
    """What a function holds: of a closure, of a method, of `functools.partial`."""
    if inspect.isfunction(function):
        cells = [cell.cell_contents for cell in function.__closure__ or () if cell != _EMPTY]
        return [x for cell in cells for _, x in leaves(cell, is_leaf=is_module)]
    if inspect.ismethod(function):
        return [function.__self__, function.__func__]
    if isinstance(function, functools.partial):
        held = (function.args, function.keywords)
        return [function.func, *(x for _, x in leaves(held, is_leaf=is_module))]
    return []


def _fields(module: nn.Module) -> list[tuple[str, Any]]:
    fields = dataclasses.fields(module)
    return [(f.name, getattr(module, f.name)) for f in fields if f.init and f.name not in _LINENS]


def _map_modules(value: Any, fn: Callable[[Any], Any]) -> Any:
    """``fn`` of the leaves of a field; the same object where nothing changes."""
    return map_leaves(fn, value, is_leaf=lambda x: x is None or is_module(x))


def _modules_in(values: Any) -> list[nn.Module]:
    return [x for _, x in leaves(values, is_leaf=is_module) if is_module(x)]


def is_module(x: Any) -> bool:
    return isinstance(x, nn.Module)


# Fields of every Linen module.
_LINENS = ("parent", "name")
_EMPTY = types.CellType()

"""What is known of the Linen modules of a model: at which path which module, and what it returns.

Submodules of a `compact` method exist only while it runs, those of `setup` once a module is bound.
So they are noted when they are seen, without what binds them to that moment: as modules that can be
bound again. A module that was given to another one (a cell to an RNN, one embedding to encoder and
decoder) is noted there by its path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import errors
from flax import linen as nn

from lifted._errors import path_text
from nnx_bridge._collections import Path, Variables, flatten
from nnx_bridge._values import leaves, map_leaves
from nnx_bridge.host._marks import has_mark, new_mark

Shapes = tuple[tuple[str, Any], ...]


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


class Layout:
    """The Linen modules of a model by their paths, and the shapes that their methods returned.

    Attributes:
      submodules: by path; the model itself is at `()`.
      returned: by path, name of the method, and shapes of the arguments.
      complete: whether a call has been watched from beginning to end.
      mark: what a call is marked with while it is watched.
    """

    def __init__(self) -> None:
        self.submodules: dict[Path, Submodule] = {}
        self.returned: dict[tuple[Path, str, Shapes], Shapes] = {}
        self.complete = False
        self.mark = new_mark()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Notes the modules whose methods run in this context, in scopes that have its mark."""

        def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            path, method = path_of(context.module), context.method_name
            if (
                path is None
                or not is_called(context.module, method)
                or not has_mark(context.module.scope, self.mark)
            ):
                return call(*args, **kwargs)
            arguments = shapes((args, kwargs))
            result = call(*args, **kwargs)
            # After the call: what `setup` makes is there now.
            self.note(context.module)
            self.returned.setdefault((path, method, arguments), shapes(result))
            return result

        with nn.intercept_methods(note):
            yield
        self.complete = True

    def note(self, module: nn.Module) -> None:
        """Notes a bound module and those that its `setup` made."""
        path = path_of(module)
        if path is None:
            return
        # Of two modules that share a scope the outer one is noted last.
        self.submodules[path] = unbound(module)
        for child in below(module):
            if path_of(child) not in self.submodules:
                self.note(child)

    @classmethod
    def of_setup(cls, module: nn.Module, variables: Any) -> Layout:
        """What can be found without inputs: the modules that `setup` makes."""
        layout = cls()

        def note(bound: nn.Module) -> None:
            waiting = [bound]
            while waiting:
                found = waiting.pop()
                dir(found)  # Runs `setup`.
                layout.note(found)
                waiting += below(found)

        def run(variables: Any) -> None:
            # In a method: outside, modules that `setup` gives to others are taken for theirs.
            module.apply(variables, method=note, mutable=True)

        try:
            jax.eval_shape(run, variables)
        except (errors.FlaxError, AttributeError, KeyError, TypeError, ValueError):
            # Its `setup` needs what is not there; the first call will say what.
            return cls()
        return layout

    def has_modules_of(self, variables: Variables) -> bool:
        """Whether the modules of all variables are known."""
        return all(path[1:-1] in self.submodules for path, _ in flatten(variables))

    def children(self, path: Path) -> list[str]:
        """Names of the modules below the one at ``path``."""
        depth = len(path)
        return [p[-1] for p in self.submodules if len(p) == depth + 1 and p[:depth] == path]


def is_called(module: nn.Module, name: str) -> bool:
    """Whether what runs on a module under this name is one of its methods, called by the model.

    Flax itself runs `setup`. A function that a transform runs on the module, such as the body of an
    RNN's `nn.scan`, is seen like a method, but belongs to who wrote the transform.
    """
    return name != "setup" and hasattr(type(module), name)


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


def shapes(tree: Any) -> Shapes:
    """The shapes of the arrays of a pytree by their paths; None for what is no array."""
    # A module among them is not asked for a shape: that would run its `setup`.
    known = lambda x: not _is_module(x) and hasattr(x, "shape")  # noqa: E731
    named = ((jax.tree_util.keystr(keys), x) for keys, x in leaves(tree))
    return tuple((path, np.shape(x) if known(x) else None) for path, x in named)


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
        if not _is_module(value):
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


def _released(value: Any, own: Path, made: dict[int, nn.Module]) -> Any:
    """A value of a field of the module at ``own`` without what binds it to a call."""
    if isinstance(value, jax.core.Tracer):
        raise _TemporaryError
    if not _is_module(value):
        if any(_is_temporary(cell) for cell in _closed_over(value)):
            raise _TemporaryError
        return value
    path = path_of(value)
    if path is not None and path[: len(own)] != own:
        return Reference(path)
    if path is not None and len(path) <= len(own):
        raise _TemporaryError  # The module itself, or one that shares its scope.
    if id(value) not in made:
        fields = {n: _map_modules(v, lambda x: _released(x, own, made)) for n, v in _fields(value)}
        made[id(value)] = type(value)(parent=None, name=value.name, **fields)
    return made[id(value)]


def below(module: nn.Module) -> list[nn.Module]:
    """The modules among the attributes of a bound module that are bound below it."""
    own = path_of(module) or ()
    bound = [(path_of(m), m) for m in _modules_in(list(vars(module).values()))]
    return [m for p, m in bound if p is not None and len(p) > len(own) and p[: len(own)] == own]


def _closed_over(function: Any) -> list[Any]:
    if not inspect.isfunction(function):
        return []
    return [cell.cell_contents for cell in function.__closure__ or () if cell != _EMPTY]


def _is_temporary(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer) or (_is_module(value) and value.scope is not None)


def _fields(module: nn.Module) -> list[tuple[str, Any]]:
    fields = dataclasses.fields(module)
    return [(f.name, getattr(module, f.name)) for f in fields if f.init and f.name not in _LINENS]


def _map_modules(value: Any, fn: Callable[[Any], Any]) -> Any:
    """``fn`` of the leaves of a field; the same object where nothing changes."""
    return map_leaves(fn, value, is_leaf=lambda x: x is None or _is_module(x))


def _modules_in(values: Any) -> list[nn.Module]:
    return [x for _, x in leaves(values, is_leaf=_is_module) if _is_module(x)]


def _is_module(x: Any) -> bool:
    return isinstance(x, nn.Module)


# Fields of every Linen module.
_LINENS = ("parent", "name")
_EMPTY = types.CellType()

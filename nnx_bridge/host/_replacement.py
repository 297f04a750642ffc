"""Submodules of a Linen model that are replaced by NNX modules while it runs.

The Variables of a replacement are variables of Linen at the path of the submodule. When the model
calls the submodule, they are read from Linen's scope, the NNX module runs on them, and what it
changed is written back to the scope. So Linen's own transforms around the submodule (scan, vmap,
remat, jit) slice and lift them as they do with any variable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core.scope import Scope

from lifted._errors import describe, path_text
from lifted._nested import thaw
from nnx_bridge import _flax_private
from nnx_bridge._collections import (
    Path,
    from_variable,
    linen_path,
    set_variable,
)
from nnx_bridge._names import linen_names
from nnx_bridge._variable_types import collection_name
from nnx_bridge.functional._snapshot import Snapshot
from nnx_bridge.host._captures import deposit, recorded, recorded_values
from nnx_bridge.host._marks import new_mark
from nnx_bridge.host._program import Program

# How many variables a message shows.
_SHOWN = 4


class Replacement:
    """An NNX module in the place of the Linen module at ``path`` of a program."""

    def __init__(self, path: Path, module: nnx.Module, program: Program) -> None:
        self.path = path
        self.program = program
        self.kind = type(module)
        self._graphdef, self._paths, self._leaves, _ = _flax_private.flatten(module)

    def __reduce__(self) -> Any:
        leaves = jax.tree.map(lambda x: x, self._leaves)
        module, _ = _flax_private.unflatten(self._graphdef, leaves)
        return Replacement, (self.path, module, self.program)

    @property
    def mark(self) -> int:
        """Tells a trace of it from others: it is of all of it but the values of its Variables."""
        bare = not all(isinstance(leaf, nnx.Variable) for leaf in self._leaves)
        try:
            return new_mark() if bare else hash((self.path, self._graphdef))
        except TypeError:  # An attribute cannot be hashed.
            return new_mark()

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"{path_text(self.path)}, replaced by {self.kind.__name__}"

    def __call__(self, linen: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
        """Calls a method of the module on the variables of the bound Linen module."""
        scope = linen.scope
        assert scope is not None
        # New Variables: what the call writes in place is not the caller's.
        leaves = jax.tree.map(lambda x: x, self._leaves)
        given = [self._read(scope, *pair) for pair in zip(self._paths, leaves, strict=True)]
        copy, nodes = _flax_private.unflatten(self._graphdef, leaves)
        captured = {id(v) for v in leaves if isinstance(v, nnx.Variable)}
        before = self._record_from(scope, copy)
        snapshot = Snapshot(nodes.values())
        method = self._method(copy, name, args, kwargs)
        with _current.pushed(Replaced(linen, self.program)):
            result = method(*args, **kwargs)
        if not snapshot.holds():
            self._check_new(copy, captured)
        for path, variable, value in zip(self._paths, leaves, given, strict=True):
            self._write(scope, path, variable, value)
        _record_to(scope, copy, before)
        return result

    def provide(self, scope: Scope) -> None:
        """Gives the model of ``scope``, which is initialised, the values that the module has.

        The model finds them like variables that were there before, so Linen's transforms around
        the module slice and stack them as in any call.
        """
        for path, leaf in zip(self._paths, self._leaves, strict=True):
            if not isinstance(leaf, nnx.Variable) or _flax_private.is_captured(path):
                continue
            collection, *names = linen_path(tuple(map(str, path)), leaf)
            names = [*self.path, *names]
            if scope.is_mutable_collection(collection):
                _put(scope, collection, names, from_variable(leaf))

    @property
    def shapes(self) -> str:
        """The shapes of its variables, as messages show them."""
        variables = [
            (path, leaf)
            for path, leaf in zip(self._paths, self._leaves, strict=True)
            if isinstance(leaf, nnx.Variable) and not isinstance(leaf, nnx.RngState)
        ]
        found = [f"{path_text(path)} {jnp.shape(leaf.get_value())}" for path, leaf in variables]
        return ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")

    def _method(self, module: Any, name: str, args: Any, kwargs: Any) -> Any:
        method = module if name == "__call__" and callable(module) else getattr(module, name, None)
        call = f"{name}{listing(args, kwargs)}"
        if not callable(method):
            raise TypeError(
                f"{self.where}: the model calls {call}, but {self.kind.__name__} has no method "
                f"{name!r}"
            )
        signature = inspect.signature(method)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"{self.where}: the model calls {call}, but {self.kind.__name__}.{name} takes "
                f"{signature}: {error}"
            ) from None
        return method

    def _read(self, scope: Scope, path: Path, leaf: Any) -> Any:
        """Puts the value from the scope into the Variable ``leaf``; returns it."""
        if not isinstance(leaf, nnx.Variable) or _flax_private.is_captured(path):
            return None
        collection, *names = place = linen_path(tuple(map(str, path)), leaf)
        value = _get(scope, collection, names)
        if value is None:
            value = self._missing(scope, place, leaf)
        set_variable(leaf, value)
        return leaf.get_raw_value()

    def _missing(self, scope: Scope, place: Path, leaf: nnx.Variable[Any]) -> Any:
        """The value of a variable that the scope does not hold."""
        collection, *names = place
        stream = _flax_private.rng_stream(leaf)
        if stream is not None and (scope.has_rng(stream) or scope.has_rng("params")):
            # A transform of Linen around it carries no state of NNX's streams, but Linen's own.
            return _drawn(scope, stream, leaf)
        raise ValueError(
            f"{self.where}: its variable {path_text((collection, *self.path, *names))} is not "
            f"there. A transform of Linen around it (nn.scan, nn.vmap, ...) must carry the "
            f"collection {collection!r}: name it in its variable_axes, or the like."
        )

    def _write(self, scope: Scope, path: Path, variable: Any, given: Any) -> None:
        if not isinstance(variable, nnx.Variable) or _flax_private.is_captured(path):
            return
        if variable.get_raw_value() is given:
            return
        collection, *names = linen_path(tuple(map(str, path)), variable)
        if scope.is_mutable_collection(collection) or not isinstance(variable, nnx.RngState):
            _put(scope, collection, names, from_variable(variable))

    def _record_from(self, scope: Scope, copy: nnx.Module) -> dict[int, dict[str, Any]]:
        """Starts what the copy records with what the scope holds."""
        before: dict[int, dict[str, Any]] = {}
        if _flax_private.captured(copy) is None:
            return before
        collections = {c: scope.variables().get(c, {}) for c in recorded(copy)}
        for _, module in nnx.iter_modules(copy, graph=True):
            for variable in _flax_private.captured(module) or ():
                variable.set_value(type(variable.get_value())())
        deposit(copy, thaw(collections), ())
        for _, module in nnx.iter_modules(copy, graph=True):
            for variable in _flax_private.captured(module) or ():
                before[id(variable)] = recorded_values(variable)
        return before

    def _check_new(self, copy: nnx.Module, known: set[int]) -> None:
        """Checks that the call made no new Variables but what it sowed for nobody."""
        _, paths, leaves, _ = _flax_private.flatten(copy)
        new = [
            path_text(path)
            for path, leaf in zip(paths, leaves, strict=True)
            if id(leaf) not in known and not isinstance(leaf, nnx.Intermediate | nnx.Perturbation)
        ]
        if new:
            raise ValueError(
                f"{self.where}: its call makes new state, {', '.join(new)}, which a Linen model "
                "cannot carry; make it when the module is made"
            )


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A bound Linen module in whose place an NNX module runs, and of which program it is."""

    module: nn.Module
    program: Program


@dataclasses.dataclass
class _Current(threading.local):
    """The Linen modules in whose places NNX modules run, the innermost last."""

    modules: list[Replaced | None] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def pushed(self, module: Replaced | None) -> Iterator[None]:
        self.modules.append(module)
        try:
            yield
        finally:
            self.modules.pop()


_current = _Current()


def replaced_module() -> Replaced | None:
    """The bound Linen module in whose place an NNX module runs right now."""
    return _current.modules[-1] if _current.modules else None


def no_replaced_module() -> contextlib.AbstractContextManager[None]:
    """A context in which `replaced_module` finds nothing."""
    return _current.pushed(None)


def _record_to(scope: Scope, copy: nnx.Module, before: dict[int, dict[str, Any]]) -> None:
    """Writes what the copy has recorded to the scope."""
    for path, module in nnx.iter_modules(copy, graph=True) if before else ():
        for variable in _flax_private.captured(module) or ():
            collection = collection_name(type(variable))
            for name, value in recorded_values(variable).items():
                known = before.get(id(variable), {}).get(name)
                if value is not known and scope.is_mutable_collection(collection):
                    _put(scope, collection, [*linen_names(map(str, path)), name], value)


def _get(scope: Scope, collection: str, names: list[Any]) -> Any:
    """A variable below the module of a scope; None where there is none."""
    value: Any = scope.get_variable(collection, names[0])
    for name in names[1:]:
        value = None if value is None else value.get(name)
    return value


def _put(scope: Scope, collection: str, names: list[Any], value: Any) -> None:
    """Writes a variable below the module of a scope."""
    name, *inner = names
    if inner:
        tree = scope.get_variable(collection, name, {})
        # In place, since the scopes of submodules hold parts of it.
        branch = tree = tree if isinstance(tree, dict) else thaw(tree)
        for key in inner[:-1]:
            branch = branch.setdefault(key, {})
        branch[inner[-1]] = value
        value = tree
    scope.put_variable(collection, name, value)


def _drawn(scope: Scope, stream: str, leaf: nnx.Variable[Any]) -> jax.Array:
    """The state of a stream of NNX that starts from a key of Linen."""
    if not isinstance(leaf, nnx.RngKey):
        return jnp.zeros((), leaf.get_value().dtype)
    key = scope.make_rng(stream)
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.wrap_key_data(key)


def listing(args: Any, kwargs: Any) -> str:
    """The arguments of a call, as messages show them."""
    of = lambda x: jax.tree.map(describe, x)  # noqa: E731
    parts = [str(of(x)).replace("'", "") for x in args]
    parts += [f"{name}={str(of(x))}".replace("'", "") for name, x in kwargs.items()]
    return f"({', '.join(parts)})"

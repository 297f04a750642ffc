"""A call of a hosted model, or of one of its nodes: Linen's program on the variables of the tree.

A node is called as its module would be called inside the model: at its own path, with the model's
keys, and with the modules that it was given. What a call changes is written only when it has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from flax import linen as nn
from flax import nnx
from flax.core.scope import CollectionFilter, LazyRng, Scope
from flax.errors import InvalidRngError, ScopeParamShapeError

from lifted._errors import path_text
from lifted._nested import thaw
from nnx_bridge._collections import Path
from nnx_bridge.host._checks import explain
from nnx_bridge.host._frame import Frame
from nnx_bridge.host._interventions import Method, intervening, mark, marked, run_method
from nnx_bridge.host._keys import Keys, drawn, named_keys
from nnx_bridge.host._layout import bind, given_module
from nnx_bridge.host._modes import find_mode, given
from nnx_bridge.host._program import Place, Program
from nnx_bridge.host._replacement import no_replaced_module, replaced_module
from nnx_bridge.host._tree import Level, find, slots


@dataclasses.dataclass
class Call:
    """What a call asks for.

    Attributes:
      mode: whether the module runs in training; None where it has no mode of its own.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rngs: Keys | nnx.Rngs | None
    method: Method
    mutable: CollectionFilter | None
    mode: bool | None = None


def call(top: Level, node: Level, asked: Call) -> Any:
    """Calls a node.

    Args:
      top: the highest node from which ``node`` is known to be reached.
      node: the node.
      asked: the call.
    """
    place: Place = slots(node)["_linen"]
    if asked.method is not None:
        asked.method = _as_function(asked.method)
    outer = replaced_module()
    rngs = slots(top).get("_linen_rngs") if asked.rngs is None else asked.rngs
    hidden = _NOTHING if outer is None else no_replaced_module()
    try:
        with hidden, _NOTHING if rngs is None else drawn(rngs) as keys:
            if not place.path and (outer is None or keys is not None):
                return _call_root(node, place.program, asked, keys)
            return _call_below(top, node, asked, keys, outer)
    except InvalidRngError as error:
        error.add_note(named_keys(rngs))
        raise


_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def _call_root(root: Level, program: Program, asked: Call, keys: Keys | None) -> Any:
    frame = Frame(root, ())
    module = _in_mode(program.module, root, asked)
    changeable = program.mutable_collections(asked.mutable, frame.variables)
    mutable = frame.mutable(changeable)
    try:
        with intervening(program, [frame], _own_modes(root, [frame], asked)) as marks:
            result = module.apply(
                {**frame.variables, **frame.places},
                *asked.args,
                rngs=keys,
                method=marked(asked.method, marks),
                mutable=mutable,
                **asked.kwargs,
            )
    except Exception as error:
        native = frozenset(frame.replacements)
        explain(error, module, frame.variables, asked.args, asked.kwargs, asked.method, native)
        raise
    if mutable is False:
        return result
    output, updates = result
    frame.keep(updates, changeable)
    return output


def _call_below(
    top: Level, node: Level, asked: Call, keys: Keys | None, replaced: nn.Module | None
) -> Any:
    place: Place = slots(node)["_linen"]
    program = place.program
    opened: dict[Path, _Opened] = {}
    outer = None if replaced is None else replaced.scope

    def module_at(path: Path) -> nn.Module:
        given = None if replaced is None else given_module(replaced, path)
        if given is not None:
            return given
        if path not in opened:
            level = node if path == place.path else _outside(top, place, path)
            unbound = _unbound(place, path)
            if path == place.path:
                unbound = _in_mode(unbound, node, asked)
            frame = Frame(level, path)
            changeable = program.mutable_collections(asked.mutable, frame.variables)
            if keys is None and outer is not None and asked.mutable is None:
                changeable = outer.mutable
            # A copy: a scope writes into the dictionaries that it is given.
            variables = thaw(frame.variables)
            scope = _scope(variables, path, frame.mutable(changeable), keys, outer)
            opened[path] = _Opened(frame, variables, scope, changeable)
            opened[path].module = bind(unbound, scope, module_at)
        return opened[path].module

    module = module_at(place.path)
    frames = [of.frame for of in opened.values()]
    modes = _own_modes(node, frames, asked)
    with intervening(program, frames, modes) as marks, _explained_below(place):
        for of in opened.values():
            of.variables.update(of.frame.places)
            mark(of.module, marks)
        output = run_method(module, asked.method, asked.args, asked.kwargs)
    updates = [dict(of.scope.mutable_variables()) for of in opened.values()]
    for of, updated in zip(opened.values(), updates, strict=True):
        of.scope.invalidate()
        of.frame.keep(updated, of.changeable)
    return output


@contextlib.contextmanager
def _explained_below(place: Place) -> Iterator[None]:
    """Says why the variables of a module may not fit it when it is called by itself."""
    try:
        yield
    except ScopeParamShapeError as error:
        error.add_note(
            f"{path_text(place.path)} was called by itself. If a transform of Linen around it "
            "(nn.scan, nn.vmap) stacks its variables, call its parent instead."
        )
        raise


@dataclasses.dataclass
class _Opened:
    """A module that a call of a node needs: its own, or one that it was given."""

    frame: Frame
    variables: dict[str, Any]
    scope: Scope
    changeable: CollectionFilter
    module: nn.Module = dataclasses.field(init=False)


def _scope(
    variables: dict[str, Any],
    path: Path,
    mutable: CollectionFilter,
    keys: Keys | None,
    outer: Scope | None,
) -> Scope:
    """The scope of a module at ``path``.

    Where the node runs in the place of a module of another call, ``outer``, its keys are those that
    this module would have; if it is another module, keys of its own.
    """
    counters = None
    if keys is None and outer is not None:
        if path == tuple(outer.path):
            streams, counters = dict(outer.rngs), outer.rng_counters
        else:
            streams = {name: LazyRng.create(outer.make_rng(name), *path) for name in outer.rngs}
    else:
        of_names = keys if isinstance(keys, Mapping) else {} if keys is None else {"params": keys}
        streams = {name: LazyRng.create(key, *path) for name, key in of_names.items()}
    name = path[-1] if path else None
    flags = None if outer is None else outer.flags
    scope = Scope(variables, streams, name, mutable, path=path, flags=flags)
    if counters is not None:
        scope.rng_counters = counters
    return scope


def _outside(top: Level, place: Place, path: Path) -> nnx.Module:
    """The level at ``path`` whose module was given to the one at ``place``."""
    start: Path = slots(top)["_linen"].path
    level = find(top, path[len(start) :]) if path[: len(start)] == start else None
    if level is None:
        raise ValueError(
            f"{path_text(place.path)} was given the module at {path_text(path)}, which is not "
            "below the node that is called: call it as an attribute of its host, which "
            f"must be there still: model.{'.'.join(place.path)}(...)"
        )
    return level


def _unbound(place: Place, path: Path) -> nn.Module:
    """The Linen module at ``path``, not bound."""
    if not path:
        return place.program.module
    known = place.program.layout.submodules.get(path)
    where = path_text(path)
    if known is None:
        raise ValueError(
            f"{where}: the Linen module of this node is not known yet, since it is made while a "
            "method of its parent runs. Make the host with sample inputs, Host(module, "
            "variables, x), or call the whole model once before."
        )
    if known.module is None:
        raise ValueError(
            f"{where}: {known.kind.__name__} cannot be called by itself, since its fields "
            f"{', '.join(known.unknown)} are made anew in each call of its parent; call the parent."
        )
    return known.module


def _in_mode(module: nn.Module, node: Level, asked: Call) -> nn.Module:
    """A module that is not bound, in the mode of the node; completes the arguments of the call."""
    training: bool | None = slots(node).get("_linen_mode")
    if training is None:
        return module
    method = method_of(module, asked.method)
    passed = given(method, asked.args, asked.kwargs)
    mode = find_mode(module, method, slots(node)["_linen"].program.training, passed)
    if mode.found:
        asked.mode = training
    values = mode.values(training)
    asked.kwargs = {**asked.kwargs, **values.arguments}
    if not values.fields:
        return module
    fields: dict[str, Any] = dict(values.fields)
    return module.clone(**fields)


def _own_modes(node: Level, frames: list[Frame], asked: Call) -> dict[Path, bool]:
    """The modes of the nodes that they do not get from the module that is called."""
    modes = {path: mode for frame in frames for path, mode in frame.modes.items()}
    if not modes:
        return modes
    modes.pop(slots(node)["_linen"].path, None)
    other = {path for path, mode in modes.items() if mode != asked.mode}
    # What a module gets from one whose mode is another may not be its own.
    inside = [p for p in modes if other and any(p[:depth] in other for depth in range(len(p)))]
    return {path: modes[path] for path in (*other, *inside)}


def method_of(module: nn.Module, method: Method) -> Callable[..., Any]:
    """The function of the module that a call runs."""
    if callable(method):
        return method
    found: Callable[..., Any] = getattr(type(module), method or "__call__", _no_method)
    return found


def _as_function(method: Method) -> Method:
    """The method without what it is bound to: the call says on which variables it runs."""
    if isinstance(method, functools.partial) and isinstance(method.func, Level):
        return method.keywords["method"]  # As a node shows it: `model.encode`.
    if inspect.ismethod(method) and isinstance(method.__self__, nn.Module):
        return method.__func__
    return method


def _no_method(module: nn.Module) -> None:
    """Stands for a method that is not there, which Linen will say."""

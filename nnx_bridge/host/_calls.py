"""A call of a hosted model, or of one of its nodes: Linen's program on the variables of the tree.

A node is called as its module would be called inside the model: at its own path, with the model's
keys, and with the modules that it was given. What a call changes is written only when it has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
from flax import linen as nn
from flax import nnx
from flax.core.scope import CollectionFilter, LazyRng, Scope
from flax.errors import InvalidRngError, ScopeParamShapeError, TraceContextError

from lifted._errors import path_text
from lifted._nested import thaw
from nnx_bridge._collections import Path
from nnx_bridge.host._captures import called_modules
from nnx_bridge.host._checks import explain
from nnx_bridge.host._frame import Frame
from nnx_bridge.host._layout import bind, given_module
from nnx_bridge.host._modes import NAMES, find_mode, given, in_modes
from nnx_bridge.host._program import Place, Program
from nnx_bridge.host._replacement import no_replaced_module, replaced_module
from nnx_bridge.host._replacing import replacing
from nnx_bridge.host._tree import Level, find, slots

Keys: TypeAlias = jax.Array | dict[str, jax.Array]
Method: TypeAlias = str | Callable[..., Any] | None


@dataclasses.dataclass
class Call:
    """What a call asks for."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rngs: Keys | nnx.Rngs | None
    method: Method
    mutable: CollectionFilter | None


def call(top: Level, node: Level, asked: Call) -> Any:
    """Calls a node.

    Args:
      top: the highest node from which ``node`` is known to be reached.
      node: the node.
      asked: the call.
    """
    place: Place = slots(node)["_linen"]
    outer = replaced_module()
    rngs = slots(top).get("_linen_rngs") if asked.rngs is None else asked.rngs
    with no_replaced_module(), _drawn(rngs) as keys:
        if not place.path and (outer is None or keys is not None):
            return _call_root(node, place.program, asked, keys)
        return _call_below(top, node, asked, keys, outer)


def _call_root(root: Level, program: Program, asked: Call, keys: Keys | None) -> Any:
    frame = Frame(root, ())
    module, kwargs = _in_mode(program.module, root, asked)
    changeable = program.mutable_collections(asked.mutable, frame.variables)
    try:
        with _around(program, [frame], _own_modes(module, root, [frame], asked)):
            result = module.apply(
                frame.variables,
                *asked.args,
                rngs=keys,
                method=asked.method,
                mutable=frame.mutable(changeable),
                **kwargs,
            )
    except Exception as error:
        native = frozenset(frame.replacements)
        explain(error, module, frame.variables, asked.args, kwargs, asked.method, native)
        raise
    if frame.mutable(changeable) is False:
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
                unbound, asked.kwargs = _in_mode(unbound, node, asked)
            frame = Frame(level, path)
            changeable = program.mutable_collections(asked.mutable, frame.variables)
            if keys is None and outer is not None and asked.mutable is None:
                changeable = outer.mutable
            scope = _scope(frame, path, changeable, keys, outer)
            opened[path] = _Opened(frame, scope, changeable)
            opened[path].module = bind(unbound, scope, module_at)
        return opened[path].module

    module = module_at(place.path)
    method = asked.method if asked.method is not None else "__call__"
    frames = [of.frame for of in opened.values()]
    modes = _own_modes(module, node, frames, asked)
    with _around(program, frames, modes), _explained_below(place):
        if callable(method):
            output = method(module, *asked.args, **asked.kwargs)
        else:
            output = getattr(module, method)(*asked.args, **asked.kwargs)
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
    scope: Scope
    changeable: CollectionFilter
    module: nn.Module = dataclasses.field(init=False)


def _scope(
    frame: Frame, path: Path, changeable: CollectionFilter, keys: Keys | None, outer: Scope | None
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
    # A copy: a scope writes into the dictionaries that it is given.
    variables = thaw(frame.variables)
    scope = Scope(variables, rngs=streams, mutable=frame.mutable(changeable), name=name, path=path)
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


@contextlib.contextmanager
def _around(program: Program, frames: list[Frame], modes: Mapping[Path, bool]) -> Iterator[None]:
    """What watches, replaces and sets Linen's modules during a call, where anything does."""
    replacements = {p: r for frame in frames for p, r in frame.replacements.items()}
    with contextlib.ExitStack() as stack:
        if any(frame.records for frame in frames):
            called = stack.enter_context(called_modules())
            for frame in frames:
                frame.called = called
        if modes:
            stack.enter_context(in_modes(modes, program.training))
        if replacements:
            stack.enter_context(replacing(replacements, program.layout))
        elif not program.layout.complete:
            stack.enter_context(program.layout.watching())
        yield


def _in_mode(module: nn.Module, node: Level, asked: Call) -> tuple[nn.Module, dict[str, Any]]:
    """A module that is not bound, and the keyword arguments, in the mode of the node."""
    training = slots(node).get("_linen_mode")
    if training is None:
        return module, asked.kwargs
    method = method_of(module, asked.method)
    chosen = slots(node)["_linen"].program.training
    mode = find_mode(module, method, chosen, given(method, asked.args, asked.kwargs))
    values = mode.values(training)
    if values.fields:
        fields: dict[str, Any] = dict(values.fields)
        module = module.clone(**fields)
    return module, {**asked.kwargs, **values.arguments}


def _own_modes(
    module: nn.Module, node: Level, frames: list[Frame], asked: Call
) -> dict[Path, bool]:
    """The modes of the nodes that they do not get from the module that is called."""
    place: Place = slots(node)["_linen"]
    modes = {path: mode for frame in frames for path, mode in frame.modes.items()}
    modes.pop(place.path, None)
    if not modes:
        return modes
    own = slots(node).get("_linen_mode")
    if own is not None:
        method = method_of(module, asked.method)
        passes = given(method, asked.args, asked.kwargs) & NAMES.keys()
        mode = find_mode(module, method, place.program.training, passes)
        if not (passes or mode.arguments or mode.fields):
            return modes  # A module without a mode has none to pass on.
    return {path: mode for path, mode in modes.items() if mode != own}


def method_of(module: nn.Module, method: Method) -> Callable[..., Any]:
    """The function of the module that a call runs."""
    if callable(method):
        return method
    found: Callable[..., Any] = getattr(type(module), method or "__call__", _no_method)
    return found


def _no_method(module: nn.Module) -> None:
    """Stands for a method that is not there, which Linen will say."""


@contextlib.contextmanager
def _drawn(rngs: Keys | nnx.Rngs | None) -> Iterator[Keys | None]:
    """The keys of a call; streams that gave keys to a call that fails get back their counts."""
    if not isinstance(rngs, nnx.Rngs):
        yield rngs
        return
    counts = [(rngs[name].count, rngs[name].count.get_value()) for name in rngs]
    try:
        keys = draw(rngs)
    except TraceContextError:
        # Closed over by a transform of JAX, the streams cannot move: what draws nothing still runs.
        try:
            yield None
        except InvalidRngError as error:
            error.add_note(_CLOSED_OVER)
            raise
        return
    try:
        yield keys
    except BaseException:
        for variable, value in counts:
            variable.set_value(value)
        raise


_CLOSED_OVER = (
    "The model is closed over by a transform of JAX, in which its streams cannot move: make it an "
    "argument of a transform of NNX or of lifted, or pass keys with rngs=."
)


def draw(rngs: nnx.Rngs) -> dict[str, jax.Array]:
    """A key for each stream; the stream `default` serves as Linen's `params`."""
    # Not by `rngs.items()`: `nnx.tabulate` compiles every public method, and it is a generator.
    keys = {name: rngs[name]() for name in rngs}
    if "default" in keys:
        keys.setdefault("params", keys.pop("default"))
    return keys

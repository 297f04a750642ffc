"""A call of a submodule of a hosted model by itself, where it stands in the model.

Or of a model without keys in the place of a submodule of another one, whose keys it takes then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax import nnx
from flax.core.scope import CollectionFilter, LazyRng, Scope
from flax.errors import ScopeParamShapeError

from lifted._errors import path_text
from lifted._nested import thaw
from nnx_bridge._collections import Path
from nnx_bridge.host._asked import Call, Prepared, in_mode, own_modes
from nnx_bridge.host._binding import as_it_runs, bind, given_module, path_of
from nnx_bridge.host._frame import Frame
from nnx_bridge.host._interventions import intervening, mark
from nnx_bridge.host._keys import Keys
from nnx_bridge.host._marks import unmarked
from nnx_bridge.host._program import Place
from nnx_bridge.host._replacement import Replaced
from nnx_bridge.host._tree import Level, find, slots


class Below(Prepared):
    """A call of the Linen module of a node, bound where it stands.

    Args:
      top: the highest node from which ``node`` is known to be reached.
      node: the node.
      asked: the call.
      keys: its keys.
      replaced: the Linen module in whose place the node runs.
      around: what is entered here lasts until the call has ended.
    """

    def __init__(
        self,
        top: Level,
        node: Level,
        asked: Call,
        keys: Keys | None,
        replaced: Replaced | None,
        around: contextlib.ExitStack,
    ) -> None:
        self.asked = asked
        self._place: Place = slots(node)["_linen"]
        self._top, self._node, self._keys, self._replaced = top, node, keys, replaced
        self._opened: dict[Path, _Opened] = {}
        module = self._module_at(self._place.path)
        opened = self._opened.values()
        frames = [of.frame for of in opened]
        marks = intervening(self._place.program, frames, own_modes(node, frames, asked), around)
        for of in opened:
            of.variables.update(of.frame.places)
            mark(of.module, marks)
        method = asked.method
        if callable(method):
            self.run = functools.partial(method, module)
        else:
            self.run = getattr(module, method or "__call__")
        self.args, self.kwargs = asked.args, asked.kwargs

    def _module_at(self, path: Path) -> nn.Module:
        """The bound module at ``path``: that of the node, or one that it was given."""
        given = None if self._replaced is None else given_module(self._replaced.module, path)
        if given is not None:
            return given
        if path not in self._opened:
            place, asked = self._place, self.asked
            outer = None if self._replaced is None else self._replaced.module.scope
            level = self._node if path == place.path else _outside(self._top, place, path)
            unbound = _unbound(place, path, self._replaced)
            if path == place.path:
                unbound = in_mode(unbound, self._node, asked)
            frame = Frame(level, path, place.program)
            changeable = place.program.mutable_collections(asked.mutable, frame.variables)
            if self._keys is None and outer is not None and asked.mutable is None:
                changeable = outer.mutable
            # A copy: a scope writes into the dictionaries that it is given.
            variables = thaw(frame.variables)
            scope = _scope(variables, path, frame.mutable(changeable), self._keys, outer)
            self._opened[path] = _Opened(frame, variables, scope, changeable)
            self._opened[path].module = bind(unbound, scope, self._module_at)
        return self._opened[path].module

    def keep(self, result: Any) -> Any:
        """See `Prepared`."""
        opened = self._opened.values()
        updates = [dict(of.scope.mutable_variables()) for of in opened]
        for of, updated in zip(opened, updates, strict=True):
            of.scope.invalidate()
            of.frame.keep(updated, of.changeable)
        return result

    def explain(self, error: Exception) -> None:
        """See `Prepared`; says why the variables of a module may not fit it."""
        super().explain(error)
        if isinstance(error, ScopeParamShapeError):
            error.add_note(
                f"{path_text(self._place.path)} was called by itself. If a transform of Linen "
                "around it (nn.scan, nn.vmap) stacks its variables, call its parent instead."
            )


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
    # What is done to the modules of the call around is not done to this one.
    flags = None if outer is None else unmarked(outer.flags)
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


def _unbound(place: Place, path: Path, replaced: Replaced | None) -> nn.Module:
    """The Linen module at ``path``, not bound."""
    if not path:
        return place.program.module
    if replaced and path == path_of(replaced.module) and replaced.program == place.program:
        return as_it_runs(replaced.module)
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

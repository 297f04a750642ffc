"""Marks by which the modules of a call are known, to what is done to them and to `nn.jit`.

What a host does to Linen's modules while they run is done through `nn.intercept_methods`, which
sees every Linen module: also those of another model that this one applies inside. And `nn.jit`
takes a trace that it has again for a module with equal fields, an equal scope and equal inputs,
whatever is done to it from outside. So a call leaves marks among the flags of its scope: they go to
the scopes of all modules below, and scopes with other marks are not equal. And since modules of one
call are equal in these, the places at which something is done are marked by a collection without
values: it makes the variables of such a module another pytree than those of its sisters.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from flax import linen as nn
from flax.core import freeze
from flax.core.scope import Scope

from nnx_bridge._collections import Path, nest
from nnx_bridge._linen_private import before_jit

COLLECTION = _FLAG = "nnx_bridge"
# The mark of a module at which nothing is done.
UNMARKED = "unmarked"
_numbers = itertools.count()


def new_mark() -> int:
    """A mark that no other call has."""
    return hash(("new", next(_numbers)))


def mark(scope: Scope, marks: Sequence[int]) -> None:
    """Marks a scope, and with it those that will be opened below."""
    both = {*scope.get_flag(_FLAG, ()), *marks}
    scope.flags = freeze({**scope.flags, _FLAG: tuple(sorted(both))})


def traced_anew() -> AbstractContextManager[None]:
    """A context in which `nn.jit` runs the code of every module that it is called on."""

    def anew(module: nn.Module) -> None:
        if module.scope is not None:
            mark(module.scope, [new_mark()])

    return before_jit(anew)


def unmarked(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a scope without marks."""
    return {name: flag for name, flag in flags.items() if name != _FLAG}


def has_mark(scope: Scope, mark: int) -> bool:
    """Whether a scope belongs to a call with this mark."""
    return mark in scope.get_flag(_FLAG, ())


def joint(marks: Mapping[Path, Hashable]) -> int:
    """One mark for all that is done in a call: of what is done at each place."""
    return hash(tuple(marks.items()))


def places(marks: Mapping[Path, Hashable]) -> dict[str, Any]:
    """The collection that marks modules, by their paths; none where there are no marks."""
    tree = nest(((*path, f"mark_{hash(mark)}"), {}) for path, mark in marks.items())
    return {COLLECTION: tree} if tree else {}

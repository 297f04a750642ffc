"""Where `nn.jit` would take the trace of one module for that of another.

The marks of a call (`_marks.py`) tell `nn.jit` which modules run in a mode of their own or have
replacements inside. A filter of `variables` that leaves their collection out hides them: then of
two modules that are equal otherwise one gets the trace of the other.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from flax import linen as nn
from flax.core.scope import Scope

from lifted._errors import path_text
from nnx_bridge._collections import Path, Variables
from nnx_bridge.host._layout import shapes
from nnx_bridge.host._marks import COLLECTION, UNMARKED, has_mark


class Guard:
    """Checks the modules of a call, so that a trace which may serve the wrong one is an error.

    Args:
      variables: those of the module at ``base``.
      marks: what each module below it is marked with, `UNMARKED` ones included; by their paths
        from there.
      mark: that of the scopes of the call.
      base: the path of the module.
    """

    def __init__(
        self, variables: Variables, marks: Mapping[Path, Hashable], mark: int, base: Path = ()
    ) -> None:
        self._variables, self._marks, self._mark, self._base = variables, marks, mark, base

    def check(self, module: nn.Module, path: Path) -> None:
        """Checks a bound module, which runs a method.

        Raises:
          ValueError: `nn.jit` hides the marks of the module, which has a twin with other marks.
        """
        own, scope = path[len(self._base) :], module.scope
        assert scope is not None
        if path[: len(self._base)] != self._base or own not in self._marks:
            return
        if _hides(scope) and has_mark(scope, self._mark):
            for twin in self._marks:
                if _are_mixed_up(self._variables, self._marks, own, twin):
                    where = path_text(path), path_text((*self._base, *twin))
                    raise ValueError(_MESSAGE.format(*where))


_MESSAGE = (
    "{}: nn.jit would take a trace of this module for {}, too, since its filter of variables hides "
    "which of them has a mode of its own or a replacement; leave the filter out, or add the "
    f"collection {COLLECTION!r} to it: nn.jit(..., variables=['params', {COLLECTION!r}])"
)


def _hides(scope: Scope) -> bool:
    """Whether a scope is the first one inside of an `nn.jit` that left the marks out."""
    transformed = scope.debug_path[-1:] if scope.parent is None else ()
    return any(t.startswith("jit(") for t in transformed) and COLLECTION not in scope.variables()


def _are_mixed_up(
    variables: Variables, marks: Mapping[Path, Hashable], path: Path, twin: Path
) -> bool:
    """Whether two modules have other marks, but what `nn.jit` knows them by may be equal."""
    if path[: len(twin)] == twin or twin[: len(path)] == path:
        return False  # One is inside of the other.
    of_path, of_twin = (
        {p[len(own) :]: m for p, m in marks.items() if p[: len(own)] == own and m != UNMARKED}
        for own in (path, twin)
    )
    return of_path != of_twin and _shapes_at(variables, path) == _shapes_at(variables, twin)


def _shapes_at(variables: Variables, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for collection, tree in variables.items():
        for name in path:
            tree = tree.get(name) if isinstance(tree, Mapping) else None
        if tree is not None:
            found[collection] = shapes(tree)
    return found

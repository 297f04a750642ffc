"""What a host does to Linen's modules while they run: it watches, replaces, sets modes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

from flax import linen as nn

from nnx_bridge._collections import Path
from nnx_bridge.host import _marks
from nnx_bridge.host._binding import below
from nnx_bridge.host._captures import called_modules
from nnx_bridge.host._frame import Frame
from nnx_bridge.host._guard import Guard
from nnx_bridge.host._modes import in_modes
from nnx_bridge.host._program import Program
from nnx_bridge.host._replacement import Replacement
from nnx_bridge.host._replacing import replacing

Method: TypeAlias = str | Callable[..., Any] | None


def intervening(
    program: Program,
    frames: list[Frame],
    modes: Mapping[Path, bool],
    around: contextlib.ExitStack,
) -> list[int]:
    """Watches, replaces and sets Linen's modules during a call; returns its marks.

    Args:
      program: the program of the model.
      frames: the variables of the modules that the call needs.
      modes: whether nodes are in training that have a mode of their own, by their paths.
      around: what is entered here lasts until the call has ended.
    """
    marks: list[int] = []
    layout, chosen = program.layout, program.training
    if layout.complete and not (modes or any(of.records or of.replacements for of in frames)):
        return marks  # As in most calls.
    if any(frame.records for frame in frames):
        # Those that are known already, since `nn.jit` may run a module without calling it.
        called = list(layout.submodules)
        for frame in frames:
            frame.called = called
        around.enter_context(called_modules(called))
    replacements: dict[Path, Replacement] = {}
    for frame in frames:
        replacements.update(frame.replacements)
    of_replacements = {path: replacement.mark for path, replacement in replacements.items()}
    if modes:
        marks.append(hash((*sorted(modes.items()), *sorted((chosen or {}).items()))))
    if replacements:
        marks.append(_marks.joint(of_replacements))
    places: dict[Path, Hashable] = {**modes, **of_replacements}
    guards: list[Guard] = []
    if places:
        unmarked = {*layout.submodules, *(path for frame in frames for path in frame.modules)}
        places = {**dict.fromkeys(unmarked, _marks.UNMARKED), **places}
        for frame in frames:
            guards.append(Guard(frame.variables, frame.below(places), marks[0], frame.path))
    if modes:
        around.enter_context(in_modes(modes, chosen, marks[0], guards))
    if replacements:
        around.enter_context(replacing(replacements, layout, marks[-1], guards=guards))
    if not (replacements or layout.complete):
        marks.append(layout.mark)
        places.update((path, path) for frame in frames for path in frame.modules)
        around.enter_context(layout.watching())
    if places:
        for frame in frames:
            frame.mark(places)
    return marks


def mark(module: nn.Module, marks: Sequence[int]) -> None:
    """Marks a bound module and those below it."""
    waiting = [module] if marks else []
    while waiting:
        found = waiting.pop()
        assert found.scope is not None
        _marks.mark(found.scope, marks)
        waiting += below(found)


def marked(method: Method, marks: Sequence[int]) -> Method:
    """The method of a Linen module, run in a scope with ``marks``."""
    if not marks:
        return method

    def run(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        mark(module, marks)
        return run_method(module, method, args, kwargs)

    return run


def run_method(module: nn.Module, method: Method, args: Any, kwargs: Any) -> Any:
    """Calls a method of a bound Linen module."""
    if callable(method):
        return method(module, *args, **kwargs)
    return getattr(module, method or "__call__")(*args, **kwargs)

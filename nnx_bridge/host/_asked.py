"""What a call of a node asks for: of which method, with what, and in which mode."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax import nnx
from flax.core.scope import CollectionFilter
from flax.errors import InvalidRngError

from nnx_bridge._collections import Path
from nnx_bridge.host._checks import check_method
from nnx_bridge.host._frame import Frame
from nnx_bridge.host._interventions import Method
from nnx_bridge.host._keys import Keys, named_keys
from nnx_bridge.host._modes import find_mode, given
from nnx_bridge.host._tree import Level, slots


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


class Prepared:
    """A call of Linen for which everything is prepared.

    The node that is called runs it itself: JAX walks the stack for every equation that it traces,
    so each frame between the model and Linen costs time.

    Attributes:
      asked: what was asked for.
      run: the function to call.
      args: its positional arguments.
      kwargs: its keyword arguments.
    """

    asked: Call
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def keep(self, result: Any) -> Any:
        """Writes what the call changed.

        Args:
          result: what `run` returned.

        Returns:
          What the Linen method returned.
        """
        raise NotImplementedError

    def explain(self, error: Exception) -> None:
        """Adds to an error of the call what is known about it."""
        if isinstance(error, InvalidRngError):
            error.add_note(named_keys(self.asked.rngs))


def in_mode(module: nn.Module, node: Level, asked: Call) -> nn.Module:
    """A module that is not bound, in the mode of the node; completes the arguments of the call."""
    check_method(module, asked.method)
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


def own_modes(node: Level, frames: list[Frame], asked: Call) -> dict[Path, bool]:
    """The modes of the nodes that they do not get from the module that is called."""
    modes: dict[Path, bool] = {}
    for frame in frames:
        modes.update(frame.modes)
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


def as_function(method: Method) -> Method:
    """The method without what it is bound to: the call says on which variables it runs."""
    if isinstance(method, functools.partial) and isinstance(method.func, Level):
        return method.keywords["method"]  # As a node shows it: `model.encode`.
    if inspect.ismethod(method) and isinstance(method.__self__, nn.Module):
        return method.__func__
    return method


def _no_method(module: nn.Module) -> None:
    """Stands for a method that is not there, which Linen will say."""

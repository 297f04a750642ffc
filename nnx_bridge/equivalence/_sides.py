"""A model, of Linen or of NNX, as a pure function of its variables.

Both kinds get and give variables as Linen has them: nested dicts by collection. The user's module
is never written: NNX modules are copied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from flax import linen as nn
from flax import nnx
from flax.core.scope import CollectionFilter

from nnx_bridge._collections import Path, Variables, flatten, linen_path, nest
from nnx_bridge.equivalence._correspondence import merged
from nnx_bridge.equivalence._recording import Recorder, drawing, streams
from nnx_bridge.host import Host, Method, unhost
from nnx_bridge.host._asked import method_of
from nnx_bridge.host._modes import NAMES, Mode, find_mode


class Arguments(NamedTuple):
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Run(NamedTuple):
    """What surrounds one call."""

    keys: Mapping[str, jax.Array]
    draws: jax.Array | None = None  # The key that all draws of the run are counted from.
    recorder: Recorder | None = None


class Side(Protocol):
    """A model as a pure function."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def variables(self) -> Variables:
        """The model's own variables, without boxes."""

    def __call__(self, variables: Variables, arguments: Arguments, run: Run) -> tuple[Any, Any]:
        """The output of a call, and the variables after it."""

    def in_mode(self, training: bool | None, arguments: Arguments) -> Side:
        """The model in training or in prediction, or as it is."""

    def has_mode(self, arguments: Arguments) -> bool:
        """Whether that makes a difference to the model, as far as can be seen."""

    def own_mode(self, arguments: Arguments) -> bool | None:
        """The mode that the arguments already say."""


@dataclasses.dataclass(frozen=True)
class LinenSide:
    """`module.apply`."""

    module: nn.Module
    variables: Variables
    mutable: CollectionFilter
    method: Method
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return type(self.module).__name__

    def __call__(self, variables: Variables, arguments: Arguments, run: Run) -> tuple[Any, Any]:
        with _surrounded(run):
            result = self.module.apply(
                variables,
                *arguments.args,
                rngs=dict(run.keys),
                mutable=self.mutable,
                method=self.method,
                **{**self.extra, **_understood(self._function(), arguments.kwargs)},
            )
        output, updates = (result, {}) if self.mutable is False else result
        return output, merged(variables, updates)

    def in_mode(self, training: bool | None, arguments: Arguments) -> LinenSide:
        if training is None:
            return self
        mode = self._mode(arguments).values(training)
        fields: dict[str, Any] = {} if mode.arguments else mode.fields
        module = self.module.clone(**fields) if fields else self.module
        return dataclasses.replace(self, module=module, extra=mode.arguments)

    def has_mode(self, arguments: Arguments) -> bool:
        mode = self._mode(arguments)
        return bool(mode.arguments or mode.fields)

    def own_mode(self, arguments: Arguments) -> bool | None:
        return _given_mode(self._function(), arguments)

    def _mode(self, arguments: Arguments) -> Mode:
        """What says the mode and is left open; where there are several, all of them."""
        passed = set(_bound(self._function(), arguments))
        return find_mode(self.module, method_of(self.module, self.method), NAMES, passed)

    def _function(self) -> Callable[..., Any]:
        return linen_function(self.module, self.method)


class NnxSide:
    """A copy of an NNX module.

    Args:
      model: The module.
      method: Its method, by name; for a host as for `module.apply`.
      training: The mode to put it in; None for that in which it is.
      extra: Further arguments of every call.
    """

    def __init__(
        self,
        model: nnx.Module,
        method: Method = None,
        training: bool | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = type(model).__name__
        self._model, self._method, self._extra = model, method, dict(extra or {})
        if isinstance(model, Host):
            self.name = type(unhost(model)[0]).__name__
        elif method is not None and not isinstance(method, str):
            raise TypeError(
                f"method: {self.name} is an NNX module, whose methods are given by their names; "
                f"got {method!r}"
            )
        copy = nnx.merge(*nnx.split(model), copy=True)
        if training is not None:
            copy.train() if training else copy.eval()
        self._graphdef, self._state = nnx.split(copy)
        self._paths = dict(_held(self._state))

    @property
    def variables(self) -> dict[str, Any]:
        return nest((path, nn.meta.unbox(v.get_value())) for path, (_, v) in self._paths.items())

    @property
    def places(self) -> dict[Path, Path]:
        """Where Variables stand in `variables`, by their paths in the module."""
        return {where: path for path, (where, _) in self._paths.items()}

    def __call__(self, variables: Variables, arguments: Arguments, run: Run) -> tuple[Any, Any]:
        given = dict(flatten(variables))
        held = dict(nnx.to_flat_state(self._state))
        for path, (where, variable) in self._paths.items():
            if path in given:
                held[where] = variable.copy(given[path])
        model = nnx.merge(self._graphdef, nnx.from_flat_state(list(held.items())), copy=True)
        kwargs = {**self._extra, **_understood(self._signature(), arguments.kwargs)}
        own = streams(model)
        if isinstance(model, Host):
            kwargs |= {"rngs": dict(run.keys), "method": self._method}
        elif "rngs" in _parameters(self._function(model)) and "rngs" not in kwargs:
            kwargs["rngs"] = nnx.Rngs(**run.keys)
            own += streams(kwargs["rngs"])
        with _surrounded(run, model, own):
            output = self._function(model)(*arguments.args, **kwargs)
        after = _held(nnx.state(model))
        return output, nest((path, nn.meta.unbox(v.get_value())) for path, (_, v) in after)

    def in_mode(self, training: bool | None, arguments: Arguments) -> NnxSide:
        if training is None:
            return self
        extra = _mode_arguments(self._signature(), arguments, training)
        return NnxSide(self._model, self._method, training, extra)

    def has_mode(self, arguments: Arguments) -> bool:
        modules = [module for _, module in nnx.iter_modules(self._model, graph=True)]
        attributes = any(name in vars(module) for module in modules for name in NAMES)
        return attributes or bool(_mode_arguments(self._signature(), arguments, True))

    def own_mode(self, arguments: Arguments) -> bool | None:
        return _given_mode(self._signature(), arguments)

    def _function(self, model: nnx.Module) -> Callable[..., Any]:
        if self._method is None or isinstance(model, Host):
            return model
        return getattr(model, str(self._method))

    def _signature(self) -> Callable[..., Any]:
        if isinstance(self._model, Host):
            return linen_function(unhost(self._model)[0], self._method)
        function = self._function(self._model)
        return function.__call__ if isinstance(function, nnx.Module) else function


def linen_function(module: nn.Module, method: Method) -> Callable[..., Any]:
    """The method of an unbound module, with its signature."""
    if callable(method):
        return method.__get__(module) if inspect.isfunction(method) else method
    return getattr(module, method or "__call__")


def _held(state: Any) -> Iterator[tuple[Path, tuple[Path, nnx.Variable[Any]]]]:
    """The Variables that are compared, with their paths in Linen and in the module."""
    uncompared = (nnx.RngState, nnx.Intermediate, nnx.Perturbation)
    for where, variable in nnx.to_flat_state(state):
        if isinstance(variable, nnx.Variable) and not isinstance(variable, uncompared):
            yield tuple(map(str, linen_path(where, variable))), (where, variable)


@contextlib.contextmanager
def _surrounded(
    run: Run, model: nnx.Module | None = None, own: Sequence[nnx.RngStream] = ()
) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if run.draws is not None:
            stack.enter_context(drawing(run.draws, own))
        if run.recorder is not None:
            stack.enter_context(run.recorder.watching(model))
        yield


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    if isinstance(function, nnx.Module):
        function = function.__call__
    return inspect.signature(function).parameters


def _mode_arguments(
    function: Callable[..., Any], arguments: Arguments, training: bool
) -> dict[str, bool]:
    """The arguments of a mode that the call leaves open."""
    given = _bound(function, arguments)
    named = [name for name in NAMES if name in _parameters(function)]
    return {name: NAMES[name] is training for name in named if name not in given}


def _given_mode(function: Callable[..., Any], arguments: Arguments) -> bool | None:
    given = _bound(function, arguments)
    values = [(name, given[name]) for name in NAMES if isinstance(given.get(name), bool)]
    return next((NAMES[name] is value for name, value in values), None)


def _bound(function: Callable[..., Any], arguments: Arguments) -> Mapping[str, Any]:
    """The arguments by the names of the parameters."""
    try:
        signature = inspect.signature(function)
        return signature.bind_partial(*arguments.args, **_known(function, arguments)).arguments
    except TypeError:
        # That they do not fit is for the call to say.
        return {}


def _understood(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments without those of a mode that the model has other means for."""
    parameters = _parameters(function)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(kwargs)
    return {n: x for n, x in kwargs.items() if n not in NAMES or n in parameters}


def _known(function: Callable[..., Any], arguments: Arguments) -> dict[str, Any]:
    return {name: x for name, x in arguments.kwargs.items() if name in _parameters(function)}

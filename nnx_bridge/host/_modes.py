"""Training and evaluation: which argument or field of a Linen module says which of both it is.

Linen has no mode of its own; every model has its own argument or field for it. It is found by its
name in the signature of the method that is called, or among the fields of the module. Hosts and
comparisons know the same names.

Linen's modules pass the mode on to those below them. A node whose own mode is another one, such as
a frozen backbone, gets its mode when its parent calls it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from flax import linen as nn

from nnx_bridge._collections import Path
from nnx_bridge.host._binding import path_of
from nnx_bridge.host._guard import Guard
from nnx_bridge.host._layout import is_called
from nnx_bridge.host._marks import has_mark

# The names by which Linen models ask for the mode, with their values in training.
NAMES = {
    **dict.fromkeys(("train", "training", "is_training", "is_train", "train_mode"), True),
    "enable_dropout": True,
    **dict.fromkeys(("deterministic", "use_running_average", "inference", "inference_mode"), False),
    **dict.fromkeys(("is_inference", "eval", "eval_mode", "is_eval", "evaluate"), False),
}


@dataclasses.dataclass(frozen=True)
class Mode:
    """What says the mode of one method of one module.

    Attributes:
      arguments: the arguments of the method, with their values in training.
      fields: the fields of the module, with their values in training.
      passed: whether the call passes the mode itself.
    """

    arguments: dict[str, bool]
    fields: dict[str, bool]
    passed: bool = False

    @property
    def found(self) -> bool:
        """Whether the module has a mode, which it can pass on to those below."""
        return self.passed or bool(self.arguments or self.fields)

    def values(self, training: bool) -> Mode:
        """The values in training, or in evaluation."""
        of = lambda names: {n: value is training for n, value in names.items()}  # noqa: E731
        return Mode(of(self.arguments), of(self.fields))


def find_mode(
    module: nn.Module,
    method: Callable[..., Any],
    chosen: Mapping[str, bool] | None,
    passed: Set[str] = frozenset(),
) -> Mode:
    """What says the mode when ``method`` of ``module`` is called.

    Args:
      module: the module.
      method: its method, or a function of the module and further arguments.
      chosen: the names to look for, with their values in training; by default `NAMES`.
      passed: the arguments that the call passes itself; one that says the mode wins.

    Raises:
      ValueError: nothing was chosen, and several names are found.
    """
    names = NAMES if chosen is None else chosen
    if not passed.isdisjoint(names):
        return Mode({}, {}, passed=True)
    taken = parameters(method)
    arguments = {n: value for n, value in names.items() if n in taken}
    fields = {
        f.name: names[f.name]
        for f in dataclasses.fields(module)
        # Linen's own layers have one name for both, of which the field wins if it is given.
        if f.name in names and (f.name not in arguments or getattr(module, f.name) is not None)
    }
    arguments = {n: value for n, value in arguments.items() if n not in fields}
    if chosen is None and len(arguments) + len(fields) > 1:
        found = [f"argument {n!r}" for n in arguments] + [f"field {n!r}" for n in fields]
        example = ", ".join(f"{n!r}: {value}" for n, value in {**arguments, **fields}.items())
        raise ValueError(
            f"{type(module).__name__}: train() and eval() find several names for the mode: "
            f"{', '.join(found)}. Say which of them to set, with their values in training, where "
            f"the host is made: Host(..., training={{{example}}}); or pass one in the call."
        )
    return Mode(arguments, fields)


@functools.lru_cache(maxsize=4096)
def parameters(method: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function by name; none where Python cannot tell."""
    try:
        return inspect.signature(method).parameters
    except (TypeError, ValueError):  # Functions written in C have no signature.
        return {}


def given(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[str]:
    """The names of the arguments that a call passes; ``method`` takes the module before them."""
    positional = list(parameters(method))[1 : len(args) + 1]
    return {*positional, *kwargs}


@contextlib.contextmanager
def in_modes(
    modes: Mapping[Path, bool],
    chosen: Mapping[str, bool] | None,
    mark: int,
    guards: Sequence[Guard] = (),
) -> Iterator[None]:
    """A context in which some modules run in modes of their own.

    Args:
      modes: whether each is in training, by their paths.
      chosen: as of `find_mode`.
      mark: that of the scopes of the model.
      guards: what checks each module.
    """

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, name = context.module, context.method_name
        path = path_of(module)
        if path is None:
            return call(*args, **kwargs)
        for guard in guards:
            guard.check(module, path)
        if path not in modes or not is_called(module, name):
            return call(*args, **kwargs)
        if not has_mark(module.scope, mark):
            return call(*args, **kwargs)
        method = getattr(type(module), name)
        values = find_mode(module, method, chosen).values(modes[path])
        names = list(parameters(method))[1:]
        args = tuple(values.arguments.get(n, x) for n, x in zip(names, args, strict=False)) + tuple(
            args[len(names) :]
        )
        rest = {n: x for n, x in values.arguments.items() if n not in names[: len(args)]}
        with _fields(module, values.fields):
            return call(*args, **{**kwargs, **rest})

    with nn.intercept_methods(intercept):
        yield


@contextlib.contextmanager
def _fields(module: nn.Module, values: Mapping[str, bool]) -> Iterator[None]:
    """A bound module with other values of its fields."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        object.__setattr__(module, name, value)  # Linen's modules are frozen.
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)
